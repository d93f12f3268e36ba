"""The page: sections of figures and tables, put into `page.html`, which escapes their text."""

import dataclasses
import importlib.resources
from collections.abc import Sequence
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from grok.report.figures import COLORS

DARK = {
    "s0": "#58a6ff", "s1": "#f0883e", "s2": "#3fb98b", "s3": "#d477c4", "s4": "#d9a514",
    "s5": "#9d8ff5", "s6": "#8b949e", "s7": "#39c5d9",
}  # fmt: skip


class Figure(NamedTuple):
    """An SVG under a title; with a second one, `narrow`, it takes the width of the page, and the
    second stands in for it on a phone."""

    title: str
    svg: Markup
    narrow: Markup | None = None


class Cell(NamedTuple):
    """What stands in a table: text, as code or not, with a patch of colour or not."""

    text: object
    color: str = ""
    code: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under a head; columns numbered in `right` are set to the right; under `closed`, where
    that is set, the table opens on a click."""

    rows: Sequence[Sequence[Cell]]
    head: Sequence[str] = ()
    right: Sequence[int] = ()
    closed: str = ""


class Part(NamedTuple):
    """A part of a bar."""

    name: str
    percent: float
    color: str


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what is under it; `heat`: the figures have the scale of a heat map."""

    title: str
    lines: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    bar: Sequence[Part] = ()
    heat: bool = False


class Tile(NamedTuple):
    """A figure that is read first."""

    name: str
    value: str


class Status(NamedTuple):
    """How things stand; `tone` is good, bad or muted."""

    text: str
    tone: str


def render(
    title: str,
    status: Status,
    facts: Sequence[str],
    tiles: Sequence[Tile],
    sections: Sequence[Section],
) -> str:
    """The whole page as HTML that needs nothing from anywhere else."""
    template = importlib.resources.files("grok.report").joinpath("page.html").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    series = {name: color for name, color in COLORS.items() if name not in ("ink", "muted")}
    light = {name: color for name, color in series.items() if name.startswith("s")}
    return environment.from_string(template).render(
        title=title,
        status=status,
        facts=facts,
        tiles=tiles,
        sections=sections,
        light=light,
        dark=DARK,
    )
