"""One picture of a run: how the loss fell, and how evenly the router used its experts.

E experts, P logged points.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

from grok.errors import DataError
from grok.report.recorded_run import as_one_run

# Okabe and Ito's palette, which readers with any form of colour blindness can tell apart.
EXPERT_COLORS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999",
)  # fmt: skip
TRAIN_COLOR, VALIDATION_COLOR, BASELINE_COLOR = "#0072B2", "#D55E00", "#555555"
# Least distance of two baseline labels, as a share of the axis height.
LABEL_GAP = 0.055


def plot_run(
    metrics_lines: Sequence[dict], path: str | Path, baselines: Mapping[str, float]
) -> None:
    """Draw the lines of a metrics.jsonl as a PNG of 1400 x 600 pixels at `path`.

    Left: training and validation loss in bits per byte, with `baselines` (name: bits per byte) as
    horizontal lines. Training loss is logged in nats per token; it is scaled by the bytes per token
    of the validation text. Without a validation line that scale is unknown: then the loss is drawn
    in nats per token, without baselines. Right: share of the tokens that each expert got. A dashed
    vertical line marks where another process took the run over. DataError without training lines.
    """
    lines, restarts = as_one_run(metrics_lines)
    training = [line for line in lines if "loss" in line]
    validation = [line for line in lines if "validation_loss" in line]
    if not training:
        raise DataError(
            f"there is no training line to draw {path} from; metrics of a run that has logged a "
            f"step would work."
        )
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.02)
    figure = Figure(figsize=(14, 6), dpi=100, layout=layout)
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    _draw_loss(left, training, validation, baselines)
    _draw_load(right, training)
    for axes in (left, right):
        _draw_restarts(axes, restarts)
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(
            MaxNLocator(7, integer=True, min_n_ticks=1, steps=(1, 2, 5, 10))
        )
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=4, frameon=False)
    figure.savefig(path)


def _draw_loss(
    axes: Axes, training: list[dict], validation: list[dict], baselines: Mapping[str, float]
) -> None:
    """Loss over steps; in bits per byte where validation lines give the scale."""
    scale, unit = 1.0, "nats per token"
    if validation:
        last = validation[-1]
        scale = last["validation_bits_per_byte"] / last["validation_loss"]
        unit = "bits per byte"
    steps_P = [line["step"] for line in training]
    loss_P = scale * np.array([line["loss"] for line in training])
    smooth_P, smoothed = _smooth(loss_P)
    if smoothed:
        axes.plot(steps_P, loss_P, color=TRAIN_COLOR, alpha=0.3, linewidth=1)
    axes.plot(
        steps_P,
        smooth_P,
        color=TRAIN_COLOR,
        linewidth=2,
        marker="o" if len(loss_P) < 8 else None,
        label="training (smoothed)" if smoothed else "training",
    )
    if validation:
        axes.plot(
            [line["step"] for line in validation],
            [line["validation_bits_per_byte"] for line in validation],
            color=VALIDATION_COLOR,
            linewidth=1,
            linestyle=":",
            marker="o",
            markersize=6,
            markeredgecolor="white",
            label="held-out",
            zorder=3,
        )
        for bits in baselines.values():
            axes.axhline(bits, color=BASELINE_COLOR, linewidth=1, zorder=1)
    # Room on both sides, so that neither the curve nor a line runs along the frame.
    axes.margins(x=0.02, y=0.08)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_ylabel(f"loss ({unit})")
    axes.set_title("Loss on training and held-out text", fontsize=13, pad=12)
    if validation:
        _label_baselines(axes, baselines)


def _label_baselines(axes: Axes, baselines: Mapping[str, float]) -> None:
    """Names and values beside the right end of their lines, moved apart where they are close."""
    bottom, top = axes.get_ylim()
    gap = LABEL_GAP * (top - bottom)
    free = bottom
    for name, bits in sorted(baselines.items(), key=lambda item: item[1]):
        height = max(bits, free)
        free = height + gap
        axes.annotate(
            f"{name} {bits:.2f}",
            (1, bits),
            (1.035, height),
            xycoords=axes.get_yaxis_transform(),
            textcoords=axes.get_yaxis_transform(),
            color=BASELINE_COLOR,
            fontsize=10,
            verticalalignment="center",
            arrowprops={
                "arrowstyle": "-",
                "color": BASELINE_COLOR,
                "linewidth": 0.8,
                "relpos": (0, 0.5),
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )


def _draw_load(axes: Axes, training: list[dict]) -> None:
    """Share of tokens of each expert, stacked; dashed lines where even shares would meet."""
    steps_P = [line["step"] for line in training]
    load_PE = np.array([line["expert_load"] for line in training])
    num_experts = load_PE.shape[1]
    if len(steps_P) == 1:  # an area needs two ends
        steps_P = [steps_P[0] - 0.5, steps_P[0] + 0.5]
        load_PE = load_PE.repeat(2, axis=0)
    smooth_PE = np.stack([_smooth(load_P)[0] for load_P in load_PE.T], axis=1)
    axes.stackplot(
        steps_P,
        smooth_PE.T,
        colors=_expert_colors(num_experts),
        labels=[f"expert {e}" for e in range(num_experts)],
        edgecolor="white",
        linewidth=0.6,
    )
    for k in range(1, num_experts):
        label = f"even: 1/{num_experts} each" if k == 1 else None
        axes.axhline(k / num_experts, color="black", linestyle=(0, (2, 3)), lw=0.9, label=label)
    axes.set_xlim(steps_P[0], steps_P[-1])
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel("share of routed tokens (mean over layers)")
    axes.set_title("Load of each expert", fontsize=13, pad=12)
    handles, labels = axes.get_legend_handles_labels()
    # Top of the legend is the top of the stack.
    axes.legend(
        handles[num_experts - 1 :: -1] + handles[num_experts:],
        labels[num_experts - 1 :: -1] + labels[num_experts:],
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        ncols=-(-num_experts // 16),
    )


def _expert_colors(num_experts: int) -> list[str]:
    if num_experts <= len(EXPERT_COLORS):
        return list(EXPERT_COLORS[:num_experts])
    return [to_hex(color) for color in colormaps["cividis"](np.linspace(0, 1, num_experts))]


def _draw_restarts(axes: Axes, restarts: list[int]) -> None:
    for number, step in enumerate(restarts):
        label = "process restarted" if number == 0 else None
        axes.axvline(step, color="black", linestyle="--", linewidth=1.2, label=label)


def _smooth(values_P: np.ndarray) -> tuple[np.ndarray, bool]:
    """Centred mean over up to 11 points, narrower at the ends, and whether it changed any.

    Fewer than 20 points stay as they are.
    """
    half = min(len(values_P) // 20, 5)
    narrow = [min(half, i, len(values_P) - 1 - i) for i in range(len(values_P))]
    smooth_P = np.array([values_P[i - n : i + n + 1].mean() for i, n in enumerate(narrow)])
    return smooth_P, half > 0
