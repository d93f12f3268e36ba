"""Every key that a config may have, read off its dataclasses: type, values, default, meaning."""

import dataclasses
import re
import types
import typing
from typing import Any, Literal

from pydantic.fields import FieldInfo

from grok.config.run import RunConfig
from grok.config.section import MAX_BYTES, MAX_INTEGER, MAX_SEED

LIMITS = (MAX_BYTES, MAX_INTEGER, MAX_SEED)  # of all integers, which no reference lists


@dataclasses.dataclass(frozen=True)
class Setting:
    """A key: its type without annotations, the values it may have in words, its default
    (dataclasses.MISSING where it must be set), and its meaning in one line."""

    type: Any
    values: str
    default: Any
    meaning: str

    @property
    def section(self) -> type | None:
        """The dataclass of the keys below this one; None for a value."""
        is_list = typing.get_origin(self.type) is tuple
        kinds = () if is_list else (self.type, *typing.get_args(self.type))
        return next(filter(_is_section, kinds), None)

    @property
    def item(self) -> type | None:
        """The dataclass of each item of a list; None for anything else."""
        items = typing.get_args(self.type) if typing.get_origin(self.type) is tuple else ()
        return items[0] if items and _is_section(items[0]) else None

    @property
    def choices(self) -> tuple[str, ...]:
        """The values listed for it, or for the items of its list; empty where they are not."""
        kind = self.type
        if typing.get_origin(kind) is tuple:
            kind = typing.get_args(kind)[0]
        return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()

    @property
    def comment(self) -> str:
        """The meaning, with the values where they are listed."""
        named = ", ".join(value for value in self.choices if value)
        return f"{self.meaning}; one of: {named}" if named else self.meaning


def schema(config_type: type = RunConfig) -> dict[str, Setting]:
    """Every dotted key of this type of config, sections included, in order."""
    settings = {}
    types_ = typing.get_type_hints(config_type)
    hints = typing.get_type_hints(config_type, include_extras=True)
    for field in dataclasses.fields(config_type):
        _, *notes = typing.get_args(hints[field.name])
        meaning = next(note for note in notes if isinstance(note, str))
        setting = Setting(types_[field.name], _values(hints[field.name]), field.default, meaning)
        settings[field.name] = setting
        if setting.section is not None:
            below = schema(setting.section)
            settings |= {f"{field.name}.{key}": inner for key, inner in below.items()}
    return settings


def describe(config: Any) -> list[tuple[str, Any, str]]:
    """Dotted key, value and comment of every setting of a config, in order; of a section that is
    None, the section alone."""
    settings, rows = schema(type(config)), []

    def add(section: Any, prefix: str) -> None:
        for field in dataclasses.fields(section):
            key, value = prefix + field.name, getattr(section, field.name)
            if _is_section(type(value)):
                add(value, f"{key}.")
            else:
                rows.append((key, value, settings[key].comment))

    add(config, "")
    return rows


def keys_of(section: str, config_type: type) -> list[str]:
    """Names of the keys directly in a section, such as data or data.datasets[0]; of the top level,
    for an empty name; none, for what is no section."""
    below: type | None = config_type
    if section:
        path = re.sub(r"(\.\d+|\[\d+\])$", "", section)
        setting = schema(config_type).get(path)
        below = None if setting is None else setting.section if path == section else setting.item
    return [field.name for field in dataclasses.fields(below)] if below else []


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


_TYPES = {str: "text", bool: "true, false", int: "integer", float: "number", None: "null"}
_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def _values(hint: Any) -> str:
    """The values of a type hint, in words: `integer, at least 1`, or `list of text`."""
    if typing.get_origin(hint) is typing.Annotated:
        kind, *notes = typing.get_args(hint)
        bounds = [
            f"{words} {getattr(bound, name):g}"
            for note in notes
            if isinstance(note, FieldInfo)
            for bound in note.metadata
            for name, words in _BOUNDS.items()
            if hasattr(bound, name) and getattr(bound, name) not in LIMITS
        ]
        return " ".join((_values(kind), " and ".join(bounds))).strip()
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner if value)
    if origin is tuple:
        return f"list of {_values(inner[0])}"
    if origin is dict:
        return f"mapping of {_values(inner[0])}, to {_values(inner[1])}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_values, inner))
    if _is_section(hint):
        return f"{{{', '.join(field.name for field in dataclasses.fields(hint))}}}"
    return _TYPES[None if hint is type(None) else hint]
