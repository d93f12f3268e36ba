"""Several runs on one page: loss by tokens seen, and their last figures side by side."""

import functools
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from grok.progress import duration
from grok.report import page
from grok.report.curves import smooth
from grok.report.figures import Series, draw_curves, png, short
from grok.report.one_run import BROAD, drawn, final, last_step
from grok.report.recorded_run import RecordedRun


def several_runs(runs: Sequence[RecordedRun]) -> str:
    """The page of several runs."""
    figures = [
        drawn(title, functools.partial(draw, series=series, unit=unit), BROAD)
        for title, unit, series in curves(runs)
    ]
    return page.render(
        title=" and ".join(run.name for run in runs),
        status=page.Status(f"{len(runs)} runs", "muted"),
        facts=[],
        tiles=[],
        sections=[
            page.Section("Loss by tokens seen", figures=figures),
            page.Section("At the end", tables=[table(runs)]),
        ],
    )


def several_runs_png(runs: Sequence[RecordedRun]) -> bytes | None:
    """The curves as a picture; None where there are none yet."""
    found = list(curves(runs))
    if not found:
        return None
    drawings = [functools.partial(draw, series=series, unit=unit) for _, unit, series in found]
    return png(drawings, [title for title, _, _ in found])


def draw(axes: Axes, series: Sequence[Series], unit: str) -> None:
    """Curves over tokens."""
    draw_curves(axes, series, "tokens seen", unit)


def curves(runs: Sequence[RecordedRun]) -> list[tuple[str, str, list[Series]]]:
    """Title, unit and one curve of each run that has it."""
    training, held_out = [], []
    for number, run in enumerate(runs):
        steps_P, loss_P = run.series("loss")
        tokens_P = run.tokens()
        if len(loss_P) == len(tokens_P) > 0 and np.isfinite(tokens_P).all():
            training.append(Series(run.name, tokens_P, smooth(loss_P), number))
            at_P, bits_P = run.series("validation_bits_per_byte", "validation")
            if len(at_P):
                seen_P = np.interp(at_P, steps_P, tokens_P)
                held_out.append(Series(run.name, seen_P, bits_P, number, "dots"))
    found = [
        ("Training loss, smoothed", "nats per token", training),
        ("Held-out text", "bits per byte", held_out),
    ]
    return [(title, unit, series) for title, unit, series in found if series]


def table(runs: Sequence[RecordedRun]) -> page.Table:
    """A row for each run: how far it came, and its figures there."""
    rows = []
    for number, run in enumerate(runs):
        _, loss_P = run.series("loss")
        _, nats_P = run.series("validation_loss", "validation")
        _, bits_P = run.series("validation_bits_per_byte", "validation")
        _, speed_P = run.series("tokens_per_second")
        tokens_P = run.tokens()
        goodput = run.goodput
        texts = [
            f"{last_step(run):,}",
            short(tokens_P[-1]) if len(tokens_P) else "",
            f"{loss_P[-final(len(loss_P)) :].mean():.4f}" if len(loss_P) else "",
            f"{nats_P[-1]:.4f}" if len(nats_P) else "",
            f"{bits_P[-1]:.4f}" if len(bits_P) else "",
            f"{np.median(speed_P):,.0f}" if len(speed_P) else "",
            duration(goodput.total) if goodput is not None else "",
        ]
        rows.append([page.Cell(run.name, f"s{number % 8}"), *(page.Cell(text) for text in texts)])
    head = (
        "run", "steps", "tokens seen", "loss, last tenth", "held-out loss", "bits per byte",
        "tokens/s", "wall time",
    )  # fmt: skip
    return page.Table(rows, head, range(1, len(head)))
