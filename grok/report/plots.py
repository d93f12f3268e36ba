"""Plots of a run, as PNG or SVG with the page's CSS colours. P points, L layers, E experts."""

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from grok.report import tips
from grok.report.tips import Tip, short

# Name of the CSS variable, and its colour on a white page. The series are Okabe and Ito's palette,
# which readers with any form of colour blindness can tell apart.
COLORS = {
    "page": "#ffffff", "ink": "#1f2328", "muted": "#656d76", "grid": "#e3e6ea", "bad": "#d1242f",
    "s0": "#0072b2", "s1": "#e69f00", "s2": "#009e73", "s3": "#cc79a7", "s4": "#56b4e9",
    "s5": "#d55e00", "s6": "#f0e442", "s7": "#999999",
}  # fmt: skip
SERIES_COLORS = [color for name, color in COLORS.items() if name.startswith("s")]
HELD_OUT_COLOR = 5
STYLES: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 2},
    "faint": {"linewidth": 1, "alpha": 0.3},
    "dots": {
        "linewidth": 1, "linestyle": ":", "marker": "o", "markersize": 6,
        "markeredgecolor": COLORS["page"], "zorder": 3,
    },
}  # fmt: skip
RESTART_STYLE: dict[str, Any] = {"color": COLORS["ink"], "linestyle": "--", "linewidth": 1.2}
# Colours of less and of more than an even share of the tokens; an even share is transparent.
LESS_RGB, MORE_RGB = (42, 120, 214), (232, 89, 12)
MIN_SMOOTHED_POINTS = 20
DPI = 100
# A drawing on given axes; it returns what shows under the pointer.
Draw = Callable[[Axes], Sequence[Tip]]


class Series(NamedTuple):
    """A curve. `kind`: line, faint (behind a smoothed line), or dots (few points, joined)."""

    name: str
    x_P: np.ndarray
    y_P: np.ndarray
    color: int = 0
    kind: str = "line"


class Marks(NamedTuple):
    """Steps at which a new process took over, and of updates that were skipped or not finite."""

    restarts: Sequence[float] = ()
    bad_steps: Sequence[float] = ()


NO_MARKS = Marks()


def smooth(values_P: np.ndarray) -> np.ndarray:
    """Mean of the finite values in a centred window of about P / 20 points; NaN without any."""
    P = len(values_P)
    finite_P = np.isfinite(values_P)
    sums = np.cumsum([0.0, *np.where(finite_P, values_P, 0)])
    counts = np.cumsum([0, *finite_P])
    index_P = np.arange(P)
    half_P = np.minimum(max(1, P // 40), np.minimum(index_P, P - 1 - index_P))
    first_P, stop_P = index_P - half_P, index_P + half_P + 1
    with np.errstate(invalid="ignore"):
        return (sums[stop_P] - sums[first_P]) / (counts[stop_P] - counts[first_P])


def thin(x_P: np.ndarray, y_P: np.ndarray, points: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """At most about `points` points, the extremes of each stretch among them; inf becomes a gap."""
    y_P = np.where(np.isfinite(y_P), y_P, np.nan)
    if len(x_P) <= points:
        return x_P, y_P
    kept_indices = {0, len(x_P) - 1}
    for stretch in np.array_split(np.arange(len(x_P)), points // 2):
        finite = stretch[np.isfinite(y_P[stretch])]
        if len(finite):
            kept_indices |= {int(finite[y_P[finite].argmin()]), int(finite[y_P[finite].argmax()])}
        if len(finite) < len(stretch):
            kept_indices.add(int(stretch[~np.isfinite(y_P[stretch])][0]))
    order = sorted(kept_indices)
    return x_P[order], y_P[order]


def raw_and_smooth(name: str, x_P: np.ndarray, y_P: np.ndarray, color: int = 0) -> list[Series]:
    """A noisy curve behind its smoothed form; a few points stay as they are."""
    if len(x_P) < MIN_SMOOTHED_POINTS:
        return [Series(name, x_P, y_P, color, "dots")]
    return [
        Series("", x_P, y_P, color, "faint"),
        Series(f"{name} (smoothed)" if name else "smoothed", x_P, smooth(y_P), color),
    ]


def draw_series(axes: Axes, series: Sequence[Series], marks: Marks = NO_MARKS) -> None:
    """Curves, with the marks as vertical lines."""
    for curve in series:
        x_P, y_P = thin(curve.x_P, curve.y_P)
        color = SERIES_COLORS[curve.color % len(SERIES_COLORS)]
        axes.plot(x_P, y_P, color=color, label=curve.name or "_", **STYLES[curve.kind])
    draw_marks(axes, marks.restarts, "process restarted", zorder=0.5, **RESTART_STYLE)
    bad_style: Any = {"color": COLORS["bad"], "linestyle": (0, (1, 2)), "linewidth": 1}
    label = "update skipped, or not finite"
    draw_marks(axes, marks.bad_steps[:200], label, zorder=0.5, **bad_style)


def draw_marks(axes: Axes, steps: Sequence[float], label: str, **style: Any) -> None:
    """Vertical lines at `steps`, one entry of the legend."""
    for number, step in enumerate(steps):
        axes.axvline(step, label="_" if number else label, **style)


def draw_curves(
    axes: Axes,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    marks: Marks = NO_MARKS,
    log: bool = False,
) -> list[Tip]:
    """Curves and marks over one axis, with a legend where there are several; `log`: the scale of
    values. Returns the values under the pointer."""
    draw_series(axes, series, marks)
    if log:
        axes.set_yscale("log")
    style_axes(axes, x_label, y_label)
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        axes.legend(
            handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False,
            fontsize=9, labelcolor=COLORS["ink"], handlelength=1.4, columnspacing=1.2,
        )  # fmt: skip
    named = [
        tips.Curve(curve.name or y_label, *thin(curve.x_P, curve.y_P), curve.kind == "dots")
        for curve in series
        if curve.kind != "faint"
    ]
    return tips.of_curves(named, x_label)


def draw_load(axes: Axes, load_LE: np.ndarray) -> list[Tip]:
    """Share of each expert in each layer, as a multiple of an even share: colours and numbers."""
    L, E = load_LE.shape
    relative_LE = load_LE * E
    axes.imshow(_heat(relative_LE), aspect="auto", interpolation="nearest")
    style_axes(axes, "expert", "layer")
    axes.grid(False)
    if E <= 16:
        axes.set_xticks(range(E))
    if L <= 16:
        axes.set_yticks(range(L))
    if L * E <= 128:
        style: Any = {"ha": "center", "va": "center", "fontsize": 8, "color": COLORS["ink"]}
        for (layer, expert), value in np.ndenumerate(relative_LE):
            axes.text(expert, layer, f"{value:.2f}", **style)
    return tips.of_loads(relative_LE)


def draw_load_over_time(axes: Axes, steps_P: np.ndarray, load_PLE: np.ndarray) -> list[Tip]:
    """The same over steps: a band for each layer, from the first down, a row for each expert."""
    P, L, E = load_PLE.shape
    stretches = np.array_split(np.arange(P), min(P, 240))
    means = np.stack([load_PLE[stretch].mean(axis=0) for stretch in stretches])  # (columns, L, E)
    picture = _heat(means.reshape(len(stretches), L * E).T * E)
    half = (steps_P[-1] - steps_P[0]) / max(1, 2 * (P - 1)) or 0.5
    extent = (steps_P[0] - half, steps_P[-1] + half, L * E - 0.5, -0.5)
    axes.imshow(picture, aspect="auto", interpolation="nearest", extent=extent)
    style_axes(axes, "step", "layer, and its experts" if L > 1 else "expert")
    axes.grid(False)
    for layer in range(1, L):
        axes.axhline(layer * E - 0.5, color=COLORS["muted"], linewidth=0.6)
    labelled = range(0, L, -(-L // 16)) if L > 1 else range(E)
    middles = [layer * E + (E - 1) / 2 for layer in labelled] if L > 1 else list(labelled)
    axes.set_yticks(middles, [str(number) for number in labelled])
    return tips.of_loads_over_time(steps_P, load_PLE, half)


def draw_load_stack(axes: Axes, steps_P: np.ndarray, load_PE: np.ndarray) -> None:
    """Share of the tokens of each expert, stacked; dotted lines where even shares would meet."""
    E = load_PE.shape[1]
    if len(steps_P) == 1:  # an area needs two ends
        steps_P = np.array([steps_P[0] - 0.5, steps_P[0] + 0.5])
        load_PE = load_PE.repeat(2, axis=0)
    if len(steps_P) >= MIN_SMOOTHED_POINTS:
        load_PE = np.stack([smooth(load_P) for load_P in load_PE.T], axis=1)
    many = [to_hex(color) for color in colormaps["cividis"](np.linspace(0, 1, E))]
    axes.stackplot(
        steps_P, load_PE.T, colors=SERIES_COLORS[:E] if len(SERIES_COLORS) >= E else many,
        labels=[f"expert {e}" for e in range(E)], edgecolor="white", linewidth=0.6,
    )  # fmt: skip
    for e in range(1, E):
        label = f"even: 1/{E} each" if e == 1 else None
        axes.axhline(e / E, color="black", linestyle=(0, (2, 3)), linewidth=0.9, label=label)
    axes.set_xlim(steps_P[0], steps_P[-1])
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))


def style_axes(
    axes: Axes, x_label: str, y_label: str, text: str = COLORS["muted"], frame: str = COLORS["grid"]
) -> None:
    """Labels, few whole ticks, horizontal grid lines, and a frame of two sides."""
    axes.set_xlabel(x_label, color=text)
    axes.set_ylabel(y_label, color=text)
    axes.grid(axis="y", color=COLORS["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=text, labelsize=9, length=3)
    axes.tick_params(which="minor", length=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(frame)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1, steps=(1, 2, 5, 10)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    if max(map(abs, axes.get_ylim())) >= 10000:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def svg(width: float, height: float, draw: Draw, label: str) -> str:
    """A figure of `width` x `height` pixels as inline SVG, with values under the pointer; `label`
    describes it to screen readers and keeps its identifiers apart from those of other figures."""
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": label, "font.size": 10}
    with matplotlib.rc_context(settings):
        figure = make_figure(width, height)
        axes = figure.subplots()
        tips_of_figure = draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text)
    # Identifiers that nothing refers to would be there once for each figure.
    text = re.sub(r' id="(?:figure|axes|patch|text|line2d|xtick|ytick|matplotlib)[^"]*"', "", text)
    # The page's font, which is near enough in width to the one that was measured.
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    for name, color in COLORS.items():
        text = text.replace(color, f"var(--{name})")
    head, _, end = text.rpartition("</svg>")
    text = f"{head}{tips.rectangles(axes, tips_of_figure)}</svg>{end}"
    return text.replace("<svg ", f'<svg aria-label="{html.escape(label)}" ', 1)


def png(drawings: Mapping[str, Draw]) -> bytes:
    """Several plots, by title, on white, two in a row."""
    rows = -(-len(drawings) // 2)
    figure = make_figure(1200, 380 * rows)
    grid = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axes, (title, draw) in zip(grid, drawings.items(), strict=False):
        draw(axes)
        axes.set_title(title, fontsize=11, pad=24, color=COLORS["ink"])
    for axes in grid[len(drawings) :]:
        axes.set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def make_figure(width: float, height: float, pad: float = 0.06) -> Figure:
    """An empty figure of so many pixels, `pad` inches around each plot."""
    layout = ConstrainedLayoutEngine(w_pad=pad, h_pad=pad)
    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout=layout)


def _heat(relative: np.ndarray) -> np.ndarray:
    """Colours (..., 4) of multiples of an even share, deeper with each doubling, to 4 times."""
    doublings = np.clip(np.log2(np.maximum(np.nan_to_num(relative), 1e-9)), -2, 2)
    color = np.where(doublings[..., None] < 0, LESS_RGB, MORE_RGB)
    return np.concatenate([color / 255, np.abs(doublings)[..., None] / 2], axis=-1)
