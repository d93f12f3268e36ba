"""The report of one run, with its state and main numbers."""

import numpy as np

from grok.errors import DONE, SAVED
from grok.progress import duration
from grok.report import page, plots, run_sections
from grok.report.recorded_run import RecordedRun
from grok.report.tips import short
from grok.train.telemetry.run_manifest import describe_commit, describe_devices


def run_page(run: RecordedRun) -> str:
    """The HTML page of a run."""
    marks = plots.Marks(run.restarts, run.bad_steps())
    sections = [
        run_sections.loss_section(run, marks),
        run_sections.curves_section(run, marks),
        run_sections.load_section(run),
        run_sections.goodput_section(run),
        run_sections.processes_section(run),
        run_sections.checkpoints_section(run),
        run_sections.config_section(run),
    ]
    return page.render(
        title=run.name,
        status=status(run),
        facts=facts(run),
        metrics=headline_metrics(run),
        sections=[section for section in sections if section is not None],
    )


def run_png(run: RecordedRun) -> bytes | None:
    """The main curves as a picture; None before the first logged step."""
    if not run.training:
        return None
    marks = plots.Marks(run.restarts, run.bad_steps())
    drawings = {
        "Loss": run_sections.draw_metric(run, "loss", "nats per token", marks),
        "Speed": run_sections.draw_metric(run, "tokens_per_second", "tokens per second", marks),
        "Gradient norm": run_sections.draw_metric(run, "grad_norm", "", marks),
    }
    steps_P, load_PLE = run.loads()
    if len(steps_P):
        title = "Load of each expert (blue: less than an even share, orange: more)"
        drawings[title] = lambda axes: plots.draw_load_over_time(axes, steps_P, load_PLE)
    return plots.png({title: draw for title, draw in drawings.items() if draw is not None})


def status(run: RecordedRun) -> tuple[str, str]:
    """State of the run, as far as its folder records it, and its tone."""
    starts = run.manifest.get("starts", ())
    step, steps = run.last_step, run.config.get("train.steps", 0)
    progress = f"step {step:,} of {steps:,}" if steps else f"step {step:,}"
    if not starts:
        return f"finished, {progress}" if steps and step >= steps else progress, "muted"
    code = starts[-1]["exit_code"]
    if code is None:
        return f"{progress}; still running, or killed: no end is recorded", "muted"
    tone = "good" if code == DONE else "muted" if code == SAVED else "bad"
    return f"{run_sections.describe_exit(code)}, {progress}", tone


def facts(run: RecordedRun) -> list[str]:
    """The model, the batch, the devices and the code."""
    lines, get = [], run.config.get
    if "model.num_layers" in run.config:
        experts, selected = get("model.moe.num_experts"), get("model.moe.num_selected")
        router = f"{experts} experts of which {selected} are used" if experts else "no experts"
        lines.append(
            f"{get('model.num_layers')} layers, width {get('model.embed_dim')}, {router}; "
            f"{get('data.batch_size')} rows of {get('data.sequence_length')} tokens a step"
        )
    lines += [run.manifest["adapters"]] if "adapters" in run.manifest else []
    for start in run.manifest.get("starts", ())[-1:]:
        axes = " x ".join(f"{axis} {size}" for axis, size in start["mesh"].items())
        lines.append(
            f"{describe_devices(start['devices'])}, mesh {axes}; grok {start['grok']}, commit "
            f"{describe_commit(start)}"
        )
    return lines


def headline_metrics(run: RecordedRun) -> dict[str, str]:
    """The numbers at the top of the page, by name."""
    metrics = {}
    for name, key, kind in (
        ("loss, last logged", "loss", "training"),
        ("held-out loss", "validation_loss", "validation"),
        ("held-out bits per byte", "validation_bits_per_byte", "validation"),
    ):
        _, values_P = run.series(key, kind)
        if len(values_P):
            metrics[name] = f"{values_P[-1]:.3f}"
    if len(run.training) and np.isfinite(run.tokens()[-1]):
        metrics["tokens seen"] = short(run.tokens()[-1])
    speed = ("tokens per second", "tokens_per_second", ",.0f")
    for name, key, style in (speed, ("MFU", "mfu", ".1%")):
        _, values_P = run.series(key)
        if len(values_P):
            metrics[name] = format(float(np.median(values_P)), style)
    if run.goodput is not None and run.goodput.total:
        metrics |= {"goodput": f"{run.goodput.share:.1%}", "wall time": duration(run.goodput.total)}
    return metrics
