"""Training speeds that others measured and published, to hold a plan against; none enters a figure
of it. MFU there is of the peak in bfloat16, by the publisher's count of FLOPs."""

from typing import NamedTuple

from grok.plan.estimate import Plan


class PublishedRun(NamedTuple):
    """A measured training run in bfloat16."""

    generation: str  # of the chips
    has_experts: bool
    model: str
    chips: int
    mfu: float
    tokens_per_second: int | None  # of a chip
    source: str


# Collected in November 2026.
RUNS = (
    PublishedRun("v5p", True, "Mixtral 8x7B", 64, 0.549, None, "MaxText, Run_Mixtral.md"),
    PublishedRun("v5p", True, "Mixtral 8x7B", 256, 0.526, 2909, "MaxText, tiering.md"),
    PublishedRun("v6e", True, "Mixtral 8x22B", 256, 0.362, 1326, "AI-Hypercomputer, tpu-recipes"),
    PublishedRun("7x", True, "Qwen3 235B-A22B", 256, 0.273, 4246, "AI-Hypercomputer, tpu-recipes"),
    PublishedRun("7x", False, "Llama 3.1 405B", 256, 0.547, 500, "AI-Hypercomputer, tpu-recipes"),
)


def published_runs(plan: Plan) -> list[PublishedRun]:
    """Runs of the plan's kind: training on this generation, with experts or without."""
    if plan.config.plan.program != "train":
        return []
    kind = plan.slice.generation, plan.config.model.moe is not None
    return [run for run in RUNS if (run.generation, run.has_experts) == kind]


def describe(run: PublishedRun) -> str:
    """The run in a line."""
    rate = f", {run.tokens_per_second:,} tokens/s/chip" if run.tokens_per_second else ""
    return f"{run.model} on {run.chips} chips, measured: MFU {run.mfu:.1%}{rate} ({run.source})"
