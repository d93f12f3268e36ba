"""Values under the pointer: transparent rectangles over a figure, each with an SVG title, which
browsers show without a script. P points, L layers, E experts."""

import html
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

MAX_STRIPS = 120  # side by side in a figure
MAX_CELLS = 1200  # of a picture
POINTS_PER_INCH = 72  # an SVG's unit


class Tip(NamedTuple):
    """A text for a rectangle in data coordinates; `y` None: all of the height."""

    text: str
    x: tuple[float, float]
    y: tuple[float, float] | None = None


class Curve(NamedTuple):
    """Points of a curve; those of a sparse one have no values between them."""

    name: str
    x_P: np.ndarray
    y_P: np.ndarray
    is_sparse: bool = False

    def value(self, left: float, middle: float, right: float) -> float:
        """The value at `middle`, or of a point between `left` and `right`; NaN where is none."""
        inside = (self.x_P >= left) & (self.x_P <= right)
        if inside.any():
            nearest = np.abs(np.where(inside, self.x_P, np.inf) - middle).argmin()
            return float(self.y_P[nearest])
        if self.is_sparse or not len(self.x_P):
            return float("nan")
        return float(np.interp(middle, self.x_P, self.y_P, left=np.nan, right=np.nan))


def of_curves(curves: Sequence[Curve], x_label: str) -> list[Tip]:
    """Strips over the whole height, each with the values of all curves there."""
    x_P = np.unique(np.concatenate([curve.x_P for curve in curves] or [np.zeros(0)]))
    if len(x_P) > MAX_STRIPS:
        x_P = x_P[np.linspace(0, len(x_P) - 1, MAX_STRIPS).round().astype(int)]
    if not len(x_P):
        return []
    between = (x_P[1:] + x_P[:-1]) / 2
    lefts = [1.5 * x_P[0] - 0.5 * x_P[1], *between] if len(x_P) > 1 else [x_P[0] - 0.5]
    rights = [*between, 1.5 * x_P[-1] - 0.5 * x_P[-2]] if len(x_P) > 1 else [x_P[0] + 0.5]
    tips = []
    for left, middle, right in zip(lefts, x_P, rights, strict=True):
        values = {curve.name: curve.value(left, middle, right) for curve in curves}
        lines = [f"{name}: {v:.4g}".removeprefix(": ") for name, v in values.items() if v == v]
        where = f"{middle:,.0f}" if middle < 1e6 else short(middle)
        tips.append(Tip("\n".join([f"{x_label} {where}", *lines]), (left, right)))
    return tips


def of_loads(relative_LE: np.ndarray) -> list[Tip]:
    """A cell for each expert of each layer, with the multiple of an even share."""
    if relative_LE.size > MAX_CELLS:
        return []
    return [
        Tip(
            f"layer {layer}, expert {expert}: {value:.3f} of an even share",
            (expert - 0.5, expert + 0.5),
            (layer - 0.5, layer + 0.5),
        )
        for (layer, expert), value in np.ndenumerate(relative_LE)
    ]


def of_loads_over_time(steps_P: np.ndarray, load_PLE: np.ndarray, half: float) -> list[Tip]:
    """Cells for each expert of each layer over some stretches of steps; `half`: half of a
    column's width, in steps."""
    P, L, E = load_PLE.shape
    tips = []
    for stretch in np.array_split(np.arange(P), min(P, max(1, MAX_CELLS // (L * E)))):
        first, last = steps_P[stretch[0]], steps_P[stretch[-1]]
        when = f"step {first:,.0f}" + (f" to {last:,.0f}" if last > first else "")
        for (layer, expert), value in np.ndenumerate(load_PLE[stretch].mean(axis=0) * E):
            row = layer * E + expert
            text = f"{when}, layer {layer}, expert {expert}: {value:.2f} of an even share"
            tips.append(Tip(text, (first - half, last + half), (row - 0.5, row + 0.5)))
    return tips if len(tips) <= 2 * MAX_CELLS else []


def rectangles(axes: Axes, tips: Sequence[Tip]) -> str:
    """SVG of the tips over axes that are drawn, cut at their frame."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    width, height = figure.get_size_inches() * POINTS_PER_INCH
    to_figure = axes.transData + figure.transFigure.inverted()
    (left, low), (right, high) = axes.get_position().get_points()
    shapes = []
    for tip in tips:
        y = tip.y or axes.get_ylim()
        x0, x1 = np.clip(to_figure.transform([(x, y[0]) for x in tip.x])[:, 0], left, right)
        y0, y1 = np.clip(to_figure.transform([(tip.x[0], v) for v in y])[:, 1], low, high)
        if x1 <= x0:
            continue
        top, tall = height * (1 - max(y0, y1)), height * abs(y1 - y0)
        shapes.append(
            f'<rect x="{width * x0:.1f}" y="{top:.1f}" width="{width * (x1 - x0):.1f}" '
            f'height="{tall:.1f}"><title>{html.escape(tip.text)}</title></rect>'
        )
    return f'<g class="tips">{"".join(shapes)}</g>' if shapes else ""


def short(value: float) -> str:
    """`950`, `1.5k`, `20M`, `3.2B`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
