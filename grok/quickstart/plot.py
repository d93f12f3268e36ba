"""The quickstart's picture: loss, and the load of the experts. E experts, P logged points."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from grok.errors import DataError
from grok.report import plots
from grok.report.recorded_run import drop_redone_steps

BASELINE_COLOR = "#555555"


def plot_run(metrics: Sequence[dict], path: str | Path, baselines: Mapping[str, float]) -> None:
    """Draws the lines of a metrics.jsonl as a PNG of 1400 x 600 pixels at `path`.

    Left: training and validation loss in bits per byte, with `baselines` (name: bits per byte) as
    horizontal lines. Training loss is logged in nats per token; it is scaled by the bytes per token
    of the validation text. Without a validation line that scale is unknown: then the loss is drawn
    in nats per token, without baselines. Right: share of the tokens that each expert got. A dashed
    vertical line marks a restart of the process. DataError without training lines."""
    lines, restarts = drop_redone_steps(metrics)
    training = [line for line in lines if "loss" in line]
    validation = [line for line in lines if "validation_loss" in line]
    if not training:
        raise DataError(f"no training line to draw {path} from; a run with logged steps would do.")
    figure = plots.make_figure(1400, 600, pad=0.12)
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    steps_P = np.array([line["step"] for line in training], float)
    _draw_loss(left, steps_P, training, validation, restarts)
    if validation:
        _draw_baselines(left, baselines)
    plots.draw_load_stack(right, steps_P, np.array([line["expert_load"] for line in training]))
    plots.draw_marks(right, restarts, "process restarted", **plots.RESTART_STYLE)
    share = "share of routed tokens (mean over layers)"
    plots.style_axes(right, "optimizer step", share, text="black", frame="black")
    right.set_title("Load of each expert", fontsize=13, pad=12)
    # From the top of the stack down, then the line of even shares.
    handles, labels = right.get_legend_handles_labels()
    E = len(training[0]["expert_load"])
    order = [*range(E - 1, -1, -1), *range(E, len(labels))[:1]]
    style: Any = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5), "ncols": -(-E // 16)}
    right.legend([handles[i] for i in order], [labels[i] for i in order], frameon=False, **style)
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=4, frameon=False)
    figure.savefig(path)


def _draw_loss(
    axes: Axes, steps_P: np.ndarray, training: Sequence[dict], validation: Sequence[dict], restarts
) -> None:
    scale, unit = 1.0, "nats per token"
    if validation:
        scale = validation[-1]["validation_bits_per_byte"] / validation[-1]["validation_loss"]
        unit = "bits per byte"
    loss_P = scale * np.array([line["loss"] for line in training])
    series = plots.raw_and_smooth("training", steps_P, loss_P)
    if validation:
        at_P = np.array([line["step"] for line in validation], float)
        bits_P = np.array([line["validation_bits_per_byte"] for line in validation])
        series.append(plots.Series("held-out", at_P, bits_P, plots.HELD_OUT_COLOR, "dots"))
    plots.draw_series(axes, series, plots.Marks(restarts))
    # Room on both sides, so that neither the curve nor a line runs along the frame.
    axes.margins(x=0.02, y=0.08)
    plots.style_axes(axes, "optimizer step", f"loss ({unit})", text="black", frame="black")
    axes.set_title("Loss on training and held-out text", fontsize=13, pad=12)


def _draw_baselines(axes: Axes, baselines: Mapping[str, float]) -> None:
    """Lines, with names and values beside their right ends, moved apart where they are close."""
    for bits in baselines.values():
        axes.axhline(bits, color=BASELINE_COLOR, linewidth=1, zorder=1)
    bottom, top = axes.get_ylim()
    gap = 0.055 * (top - bottom)  # least distance of two labels
    free = bottom
    transform = axes.get_yaxis_transform()
    arrow = {
        "arrowstyle": "-", "color": BASELINE_COLOR, "linewidth": 0.8, "relpos": (0, 0.5),
        "shrinkA": 0, "shrinkB": 0,
    }  # fmt: skip
    style: Any = {"color": BASELINE_COLOR, "fontsize": 10, "verticalalignment": "center"}
    style |= {"xycoords": transform, "textcoords": transform, "arrowprops": arrow}
    for name, bits in sorted(baselines.items(), key=lambda item: item[1]):
        height = max(bits, free)
        free = height + gap
        axes.annotate(f"{name} {bits:.2f}", (1, bits), (1.035, height), **style)
