"""The HTML page: sections of figures and tables, put into `page.html`, which escapes their text."""

import dataclasses
import importlib.resources
from collections.abc import Sequence
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from grok.report.plots import COLORS

# Colours of series on a dark page.
DARK = {
    "s0": "#58a6ff", "s1": "#e6a32e", "s2": "#2fbf93", "s3": "#d98bb8", "s4": "#7cc4f0",
    "s5": "#f0783e", "s6": "#f0e442", "s7": "#a0a8b0",
}  # fmt: skip


class Figure(NamedTuple):
    """An SVG under a title. With a second one, `narrow`, it takes the width of the page, and the
    second replaces it on a phone."""

    title: str
    svg: Markup
    narrow: Markup | None = None


class Cell(NamedTuple):
    """Content of a table's cell: text, perhaps set as code, perhaps with a swatch of colour."""

    text: object
    color: str = ""
    code: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under a header; `right_aligned` numbers columns. A table with a `summary` is folded
    under that text until clicked."""

    rows: Sequence[Sequence[Cell]]
    header: Sequence[str] = ()
    right_aligned: Sequence[int] = ()
    summary: str = ""


class BarSegment(NamedTuple):
    """A segment of a stacked bar."""

    name: str
    percent: float
    color: str


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading with paragraphs, a bar, figures and tables; `heat_scale`: its figures need one."""

    title: str
    paragraphs: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    bar: Sequence[BarSegment] = ()
    heat_scale: bool = False


class Metric(NamedTuple):
    """A number at the top of the page."""

    name: str
    value: str


class Status(NamedTuple):
    """State of the run in words; `tone` is good, bad or muted."""

    text: str
    tone: str


def render(
    title: str,
    status: Status,
    sections: Sequence[Section],
    facts: Sequence[str] = (),
    metrics: Sequence[Metric] = (),
) -> str:
    """The whole page as HTML that loads nothing from anywhere else."""
    template = importlib.resources.files("grok.report").joinpath("page.html").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(template).render(
        title=title,
        status=status,
        facts=facts,
        metrics=metrics,
        sections=sections,
        light={name: color for name, color in COLORS.items() if name in DARK},
        dark=DARK,
    )
