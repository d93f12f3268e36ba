"""Several runs on one page: loss by tokens seen, and their final values side by side."""

import functools
from collections.abc import Sequence

import numpy as np

from grok.progress import duration
from grok.report import page
from grok.report.plots import SERIES_COLORS, Series, draw_curves, png, short, smooth
from grok.report.recorded_run import RecordedRun, final_points
from grok.report.run_sections import BROAD, Draw, svg_figure


def comparison_page(runs: Sequence[RecordedRun]) -> str:
    """The HTML page of several runs."""
    figures = [svg_figure(title, draw, BROAD) for title, draw in drawings(runs).items()]
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
    curves = drawings(runs)
    return png(curves) if curves else None


def drawings(runs: Sequence[RecordedRun]) -> dict[str, Draw]:
    """Training loss and held-out bits per byte over tokens seen, a curve a run, by title."""
    training, held_out = [], []
    for number, run in enumerate(runs):
        steps_P, loss_P = run.series("loss")
        tokens_P = run.tokens()
        if len(loss_P) == len(tokens_P) > 0 and np.isfinite(tokens_P).all():
            training.append(Series(run.name, tokens_P, smooth(loss_P), number))
            validated_P, bits_P = run.series("validation_bits_per_byte", "validation")
            if len(validated_P):
                seen_P = np.interp(validated_P, steps_P, tokens_P)
                held_out.append(Series(run.name, seen_P, bits_P, number, "dots"))
    curves = {
        "Training loss, smoothed": ("nats per token", training),
        "Held-out text": ("bits per byte", held_out),
    }
    return {
        title: functools.partial(draw_curves, series=series, x_label="tokens seen", y_label=unit)
        for title, (unit, series) in curves.items()
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
                short(tokens_P[-1]) if len(tokens_P) else "",
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
    colors = [f"s{number % len(SERIES_COLORS)}" for number in range(len(runs))]
    return page.Table(rows, header, range(1, len(header)), colors=colors)
