"""A training run: its length, losses, adapters and checkpoints."""

import dataclasses
from typing import Annotated, Literal

from grok.config.section import (
    Count,
    CountOrZero,
    PathText,
    Positive,
    PositiveOrZero,
    Section,
    Seed,
    round_up,
)
from grok.errors import ConfigError, bad_value


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """Length of the run, its losses, and how often it reports."""

    steps: Annotated[Count, "optimizer steps of the whole run"] = 1000
    seed: Annotated[Seed, "seed of the parameter initialisation"] = 0
    init_from: Annotated[
        PathText, "weights to start from: ckpt-0, Hugging Face (hf://ORG/NAME), checkpoint"
    ] = ""
    z_loss: Annotated[PositiveOrZero, "weight of log(Z)^2 of the output softmax in the loss"] = 0.0
    router_balance_loss: Annotated[PositiveOrZero, "weight of the load-balancing loss"] = 0.0
    grad_accum_steps: Annotated[Count, "microbatches per step, whose gradients are accumulated"] = 1
    grad_spike_factor: Annotated[
        PositiveOrZero, "skip steps with a gradient norm above so many times its average; 0: none"
    ] = 0.0
    max_bad_steps: Annotated[Count, "consecutive bad steps after which the run ends"] = 10
    rollback_on_divergence: Annotated[bool, "return to a good checkpoint, skip the batches"] = False
    sdc_check: Annotated[
        Literal["off", "stop", "rollback"],
        "when devices differ that should have the same bits: end the run, or return to a good "
        "checkpoint once; off: they are not compared",
    ] = "off"
    sdc_check_every: Annotated[Count, "steps between two such comparisons"] = 500
    log_every: Annotated[Count, "steps between lines of metrics.jsonl"] = 10
    eval_every: Annotated[CountOrZero, "steps between validation passes; 0: only at the end"] = 0
    eval_tasks: Annotated[
        tuple[str, ...], "tasks of lm-eval (extra `eval`) to run after each validation pass"
    ] = ()
    eval_tasks_folder: Annotated[
        PathText, "YAML files of more tasks; the Python functions that they name are run"
    ] = ""
    eval_tasks_limit: Annotated[CountOrZero, "examples of each of these tasks; 0: all"] = 0
    start_timeout_seconds: Annotated[
        CountOrZero, "abort when the first step does not begin so long after the start; 0: never"
    ] = 3600
    hang_timeout_seconds: Annotated[CountOrZero, "abort when no step ends so long; 0: never"] = 1800
    heartbeat_timeout_seconds: Annotated[Count, "abort when a host is silent for so long"] = 60
    tensorboard: Annotated[bool, "write TensorBoard event files (extra `tensorboard`)"] = False
    wandb: Annotated[str, "Weights & Biases project that receives metrics (extra `wandb`)"] = ""
    profile: Annotated[tuple[Count, ...], "first and last step to profile for XProf; []: none"] = ()

    def __post_init__(self) -> None:
        first, last = self.profile if len(self.profile) == 2 else (1, 0)
        if self.profile and not first <= last <= self.steps:
            start = max(1, min(20, self.steps - 2))
            near = [start, min(start + 2, self.steps)]
            problem = f"is no first and last of {self.steps} steps"
            raise bad_value("train.profile", list(self.profile), problem, near)
        for key in ("eval_tasks_folder", "eval_tasks_limit"):
            if (value := getattr(self, key)) and not self.eval_tasks:
                problem = "has no effect without train.eval_tasks; train.eval_tasks=[TASK]"
                raise ConfigError(f"train.{key}={value} {problem} would work.")
        default = self.default("sdc_check_every")
        if self.sdc_check == "off" and self.sdc_check_every != default:
            problem = "has no effect with train.sdc_check=off; train.sdc_check=stop"
            raise ConfigError(f"train.sdc_check_every={self.sdc_check_every} {problem} would work.")
        if 0 < self.grad_spike_factor <= 1:
            problem = "would skip usual steps"
            raise bad_value("train.grad_spike_factor", self.grad_spike_factor, problem, 10)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(Section):
    """Low-rank adapters, trained in place of the weights that train.init_from names."""

    rank: Annotated[CountOrZero, "rank of the adapters; 0: no adapters"] = 0
    alpha: Annotated[Positive, "scales adapters by alpha/rank"] = 16.0
    targets: Annotated[
        tuple[str, ...],
        "matrices with adapters, of query, key, value, out (attention), gate, up, down (experts)",
    ] = ("query", "key", "value", "out")

    def __post_init__(self) -> None:
        if not self.targets or len(set(self.targets)) < len(self.targets):
            problem = f"lora.targets={list(self.targets)} should name matrices, each once"
            raise ConfigError(f"{problem}; lora.targets=[query, value] would work.")

    @property
    def scale(self) -> float:
        """Factor on what an adapter adds."""
        return self.alpha / max(1, self.rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """Checkpoints to save and to keep."""

    every: Annotated[
        CountOrZero,
        "steps between checkpoints; 0: a new one when the last is saved; the last step always",
    ] = 500
    keep: Annotated[Count, "newest checkpoints to keep"] = 3
    keep_every: Annotated[CountOrZero, "also keep multiples of so many steps; 0: none"] = 0
    keep_best: Annotated[CountOrZero, "also keep so many with the lowest best_metric"] = 0
    best_metric: Annotated[
        Literal["validation_loss", "validation_bits_per_byte"], "metric that keep_best compares"
    ] = "validation_loss"

    def __post_init__(self) -> None:
        if not self.every:
            for key in ("keep_every", "keep_best"):
                if value := getattr(self, key):
                    problem = "names steps, and checkpoint.every=0 saves at any"
                    raise bad_value(f"checkpoint.{key}", value, problem, 0)
            return
        if self.keep_every % self.every:
            near = round_up(self.keep_every, self.every)
            problem = f"is no multiple of checkpoint.every={self.every}"
            raise bad_value("checkpoint.keep_every", self.keep_every, problem, near)
