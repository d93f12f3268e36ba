"""The report of one run, with its state and main numbers, and the comparison of several."""

import functools
from collections.abc import Sequence

import numpy as np

from grok.errors import DONE, SAVED
from grok.progress import duration
from grok.report import page, plots, run_sections
from grok.report.recorded_run import RecordedRun, final_points
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
        metrics["tokens seen"] = plots.short(run.tokens()[-1])
    speed = ("tokens per second", "tokens_per_second", ",.0f")
    for name, key, style in (speed, ("MFU", "mfu", ".1%")):
        _, values_P = run.series(key)
        if len(values_P):
            metrics[name] = format(float(np.median(values_P)), style)
    if run.goodput is not None and run.goodput.total:
        metrics |= {"goodput": f"{run.goodput.share:.1%}", "wall time": duration(run.goodput.total)}
    return metrics


def comparison_page(runs: Sequence[RecordedRun]) -> str:
    """The HTML page of several runs."""
    figures = [
        run_sections.svg_figure(title, draw, run_sections.BROAD)
        for title, draw in token_curves(runs).items()
    ]
    return page.render(
        title=" and ".join(run.name for run in runs),
        status=(f"{len(runs)} runs", "muted"),
        sections=[
            page.Section("Loss by tokens seen", figures=figures),
            page.Section("At the end", tables=[final_table(runs)]),
        ],
    )


def comparison_png(runs: Sequence[RecordedRun]) -> bytes | None:
    """The curves as a picture; None where there are none yet."""
    return plots.png(curves) if (curves := token_curves(runs)) else None


def token_curves(runs: Sequence[RecordedRun]) -> dict[str, run_sections.Draw]:
    """Training loss and held-out bits per byte over tokens seen, a curve a run, by title."""
    training, held_out = [], []
    for number, run in enumerate(runs):
        steps_P, loss_P = run.series("loss")
        tokens_P = run.tokens()
        if len(loss_P) == len(tokens_P) > 0 and np.isfinite(tokens_P).all():
            training.append(plots.Series(run.name, tokens_P, plots.smooth(loss_P), number))
            validated_P, bits_P = run.series("validation_bits_per_byte", "validation")
            if len(validated_P):
                seen_P = np.interp(validated_P, steps_P, tokens_P)
                held_out.append(plots.Series(run.name, seen_P, bits_P, number, "dots"))
    loss, text = "Training loss, smoothed", "Held-out text"
    curves = ((loss, "nats per token", training), (text, "bits per byte", held_out))
    draw = functools.partial(plots.draw_curves, x_label="tokens seen")
    return {
        title: functools.partial(draw, series=series, y_label=unit)
        for title, unit, series in curves
        if series
    }


def final_table(runs: Sequence[RecordedRun]) -> page.Table:
    """A row for each run: its progress, and its values there."""
    rows = []
    for run in runs:
        (_, loss_P), (_, speed_P) = run.series("loss"), run.series("tokens_per_second")
        losses = [
            f"{values_P[-1]:.4f}" if len(values_P) else ""
            for key in ("validation_loss", "validation_bits_per_byte")
            for _, values_P in [run.series(key, "validation")]
        ]
        tokens_P = run.tokens()
        rows.append(
            (
                run.name,
                f"{run.last_step:,}",
                plots.short(tokens_P[-1]) if len(tokens_P) else "",
                f"{loss_P[-final_points(len(loss_P)) :].mean():.4f}" if len(loss_P) else "",
                *losses,
                f"{np.median(speed_P):,.0f}" if len(speed_P) else "",
                duration(run.goodput.total) if run.goodput is not None else "",
            )
        )
    header = (
        "run", "steps", "tokens seen", "loss, last tenth", "held-out loss", "bits per byte",
        "tokens/s", "wall time",
    )  # fmt: skip
    colors = [f"s{number % len(plots.SERIES_COLORS)}" for number in range(len(runs))]
    return page.Table(rows, header, range(1, len(header)), colors=colors)
