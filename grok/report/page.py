"""The HTML page: sections of figures and tables, put into `page.html`, which escapes their text."""

import importlib.resources
from collections.abc import Mapping, Sequence
from types import MappingProxyType
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
    """An SVG under a title; of the page's width if a second, `narrow`, replaces it on a phone."""

    title: str
    svg: Markup
    narrow: Markup | None = None


class Table(NamedTuple):
    """Rows under a header; `right_aligned` and `code_columns` number columns; `colors`: a swatch in
    front of each row. A table with a `summary` is folded under that text until clicked."""

    rows: Sequence[Sequence[object]]
    header: Sequence[str] = ()
    right_aligned: Sequence[int] = ()
    code_columns: Sequence[int] = ()
    colors: Sequence[str] = ()
    summary: str = ""


class Section(NamedTuple):
    """A heading with paragraphs, stacked bars (by label; name, percent and colour of each segment),
    figures and tables; `heat_scale`: its figures need one."""

    title: str
    paragraphs: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    bars: Mapping[str, Sequence[tuple[str, float, str]]] = MappingProxyType({})
    heat_scale: bool = False


def render(
    title: str,
    status: tuple[str, str],
    sections: Sequence[Section],
    facts: Sequence[str] = (),
    metrics: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The whole page as HTML that loads nothing from anywhere else. `status`: text, and its tone:
    good, bad or muted; `metrics`: the numbers at the top, by name."""
    template = importlib.resources.files("grok.report").joinpath("page.html").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(template).render(
        title=title,
        status=status[0],
        tone=status[1],
        facts=facts,
        metrics=metrics,
        sections=sections,
        light={name: color for name, color in COLORS.items() if name in DARK},
        dark=DARK,
    )
