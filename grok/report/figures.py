"""Figures of a run, drawn by matplotlib as SVG that takes its colours from the page, or as PNG.

In SVG every colour is a CSS variable of the page, so that one drawing suits a light and a dark one,
and text is text. P points, L layers, E experts.
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from grok.report.curves import smooth, thin

# Colours by their part in a figure: the CSS variable's name, and what it is on a white page.
COLORS = {
    "ink": "#1f2328", "muted": "#656d76", "grid": "#e3e6ea", "bad": "#d1242f",
    "s0": "#2a78d6", "s1": "#e8710a", "s2": "#1a9c6b", "s3": "#b4489c", "s4": "#c79100",
    "s5": "#6a5acd", "s6": "#7a8590", "s7": "#0f9bb5",
}  # fmt: skip
NUM_SERIES = 8
STYLES: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 1.8},
    "faint": {"linewidth": 0.8, "alpha": 0.35},
    "dots": {"linewidth": 1.2, "marker": "o", "markersize": 4},
}
# Loads of experts: colour of less and of more than an even share; even is the page itself.
LESS, MORE = (42, 120, 214), (232, 89, 12)
# Most columns of a heat map over time.
COLUMNS = 240
DPI = 100


class Series(NamedTuple):
    """One curve. `kind`: line, faint (behind a smoothed line), or dots (few points, joined)."""

    name: str
    x_P: np.ndarray
    y_P: np.ndarray
    color: int = 0
    kind: str = "line"


class Marks(NamedTuple):
    """Steps at which a process took over, and at which an update was skipped or not finite."""

    restarts: Sequence[float]
    bad: Sequence[float]


NO_MARKS = Marks((), ())


def raw_and_smooth(name: str, x_P: np.ndarray, y_P: np.ndarray, color: int = 0) -> list[Series]:
    """A noisy curve behind its smoothed form; few points stay as they are."""
    if len(x_P) < 20:
        return [Series(name, x_P, y_P, color, "dots")]
    return [
        Series("", x_P, y_P, color, "faint"),
        Series(f"{name}, smoothed" if name else "smoothed", x_P, smooth(y_P), color),
    ]


def draw_curves(
    axes: Axes, series: Sequence[Series], x_label: str, y_label: str, marks: Marks = NO_MARKS
) -> None:
    """Curves over one axis, with the marks as vertical lines."""
    for each in series:
        x_P, y_P = thin(each.x_P, each.y_P)
        color = COLORS[f"s{each.color % NUM_SERIES}"]
        axes.plot(x_P, y_P, color=color, label=each.name or "_", **STYLES[each.kind])
    for steps, color, dashes, label in (
        (marks.restarts, COLORS["muted"], (0, (4, 3)), "process restarted"),
        (marks.bad[:200], COLORS["bad"], (0, (1, 2)), "update skipped, or not finite"),
    ):
        for number, step in enumerate(steps):
            axes.axvline(
                step, color=color, lw=1, ls=dashes, zorder=0.5, label="_" if number else label
            )
    _style(axes, x_label, y_label)
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        axes.legend(
            handles,
            labels,
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=3,
            frameon=False,
            fontsize=9,
            labelcolor=COLORS["ink"],
            handlelength=1.4,
            columnspacing=1.2,
        )


def draw_load(axes: Axes, load_LE: np.ndarray) -> None:
    """Share of each expert in each layer, as a multiple of an even share, with the figures."""
    L, E = load_LE.shape
    relative = load_LE * E
    axes.imshow(_heat(relative), aspect="auto", interpolation="nearest")
    _style(axes, "expert", "layer")
    axes.grid(False)
    axes.set_xticks(range(E)) if E <= 16 else None
    axes.set_yticks(range(L)) if L <= 16 else None
    if L * E <= 128:
        for (layer, expert), value in np.ndenumerate(relative):
            axes.text(
                expert, layer, f"{value:.2f}", ha="center", va="center",
                fontsize=8, color=COLORS["ink"],
            )  # fmt: skip


def draw_load_over_time(axes: Axes, steps_P: np.ndarray, load_PLE: np.ndarray) -> None:
    """The same over steps: a band for each layer, from the first down, a row for each expert."""
    P, L, E = load_PLE.shape
    parts = np.array_split(np.arange(P), min(P, COLUMNS))
    means = np.stack([load_PLE[part].mean(axis=0) for part in parts])  # (columns, L, E)
    picture = _heat(means.reshape(len(parts), L * E).T * E)
    half = (steps_P[-1] - steps_P[0]) / max(1, 2 * (P - 1)) or 0.5
    extent = (steps_P[0] - half, steps_P[-1] + half, L * E - 0.5, -0.5)
    axes.imshow(picture, aspect="auto", interpolation="nearest", extent=extent)
    _style(axes, "step", "layer, and its experts" if L > 1 else "expert")
    axes.grid(False)
    for layer in range(1, L):
        axes.axhline(layer * E - 0.5, color=COLORS["muted"], linewidth=0.6)
    shown = range(0, L, -(-L // 16)) if L > 1 else range(E)
    middles = [layer * E + (E - 1) / 2 for layer in shown] if L > 1 else list(shown)
    axes.set_yticks(middles, [str(number) for number in shown])


def svg(width: float, height: float, draw: Callable[[Axes], None], label: str) -> str:
    """A figure of `width` x `height` pixels as inline SVG; `label` says what it shows to those
    who cannot see it, and keeps its identifiers apart from those of other figures."""
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": label, "font.size": 10}
    with matplotlib.rc_context(settings):
        figure = _figure(width, height)
        draw(figure.subplots())
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
    return text.replace("<svg ", f'<svg aria-label="{label}" ', 1)


def png(figures: Sequence[Callable[[Axes], None]], titles: Sequence[str]) -> bytes:
    """Several figures side by side, two in a row, on white."""
    rows = -(-len(figures) // 2)
    figure = _figure(1200, 380 * rows)
    grid = figure.subplots(rows, 2, squeeze=False).flat
    for axes, draw, title in zip(grid, figures, titles, strict=False):
        draw(axes)
        axes.set_title(title, fontsize=11, pad=24, color=COLORS["ink"])
    for axes in list(grid)[len(figures) :]:
        axes.set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _figure(width: float, height: float) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06)
    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout=layout)


def _style(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label, color=COLORS["muted"])
    axes.set_ylabel(y_label, color=COLORS["muted"])
    axes.grid(axis="y", color=COLORS["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=COLORS["muted"], labelsize=9, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(COLORS["grid"])
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1, steps=(1, 2, 5, 10)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    if max(map(abs, axes.get_ylim())) >= 10000:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def short(value: float) -> str:
    """`950`, `1.5k`, `20M`, `3.2B`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _heat(relative: np.ndarray) -> np.ndarray:
    """Colours (..., 4) of multiples of an even share: deeper with each doubling or halving, up to
    four times; an even share shows the page through."""
    doublings = np.clip(np.log2(np.maximum(np.nan_to_num(relative), 1e-9)), -2, 2)
    color = np.where(doublings[..., None] < 0, LESS, MORE)
    return np.concatenate([color / 255, np.abs(doublings)[..., None] / 2], axis=-1)
