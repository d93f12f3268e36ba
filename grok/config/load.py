"""YAML files and dotted overrides -> a checked config, and a config -> plain data.

A config is a `RunConfig`, or another dataclass made like it, which a caller names. The files that
a file `extends` go underneath, overrides on top, and pydantic checks the result. Every refusal is a
`ConfigError`, one sentence: where, which key, what is wrong, what would work.
"""

import dataclasses
import difflib
import functools
import json
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from grok.config import RunConfig
from grok.config.yaml import Places, parse
from grok.errors import ConfigError


@overload
def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig: ...


@overload
def load_config[Kind](path: str | Path, overrides: Sequence[str], kind: type[Kind]) -> Kind: ...


def load_config(path: Any, overrides: Any = (), kind: Any = RunConfig) -> Any:
    """The checked config of a YAML file or bare preset name, under overrides like `train.steps=50`.

    `kind` is the dataclass that says which keys there are. Raises ConfigError, one sentence for a
    person, when anything in it cannot work.
    """
    file = _find(str(path), Path(), kind)
    data, places = _read_file(file, (), kind)
    return checked(data, overrides, kind, str(file), places)


def checked(
    data: dict[str, Any],
    overrides: Sequence[str],
    kind: type,
    source: str,
    places: Places | None = None,
) -> Any:
    """Plain data under overrides, as a config of this `kind`; `source` names it in errors, and
    `places` says of keys where they were set."""
    places = {} if places is None else places
    for override in overrides:
        data = _merge(data, _read_override(override, places))
    return _check(data, places, source, kind)


def from_dict(data: Mapping[str, Any], source: str = "stored config") -> RunConfig:
    """The checked config in plain data, inverse of `to_dict`; `source` names it in errors."""
    return checked(dict(data), (), RunConfig, source)


def with_overrides(config: RunConfig, overrides: Sequence[str], source: str) -> RunConfig:
    """`config` under overrides like those of `load_config`; `source` names it in errors."""
    return checked(to_dict(config), overrides, RunConfig, source)


def to_dict(config: Any) -> dict[str, Any]:
    """The whole config as plain data that JSON can hold."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flatten(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every setting in plain data, in order."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


class Setting(typing.NamedTuple):
    """What is known of a key: its type, its one-line meaning, and its default, None without one."""

    kind: Any
    meaning: str
    default: Any


@functools.cache
def schema(kind: type = RunConfig) -> dict[str, Setting]:
    """Every dotted key that a config of this kind may have, sections included, in order."""

    def settings(section: type, prefix: str) -> Iterator[tuple[str, Setting]]:
        hints = typing.get_type_hints(section, include_extras=True)
        for field in dataclasses.fields(section):
            kind, *notes = typing.get_args(hints[field.name])
            texts = [note.description for note in notes if isinstance(note, FieldInfo)]
            default = None if field.default is dataclasses.MISSING else field.default
            yield prefix + field.name, Setting(kind, next(filter(None, texts)), default)
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                yield from settings(kind, f"{prefix}{field.name}.")

    return dict(settings(kind, ""))


def describe(config: Any) -> list[tuple[str, Any, str]]:
    """Every setting of the config, in order: its dotted key, its value, its one-line meaning."""
    kind: type = type(config)
    return [
        (key, functools.reduce(getattr, key.split("."), config), setting.meaning)
        for key, setting in schema(kind).items()
        if not dataclasses.is_dataclass(setting.kind)
    ]


def configs_folder() -> Path:
    """The folder of the presets: inside the installed package, or beside it in the repository."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def presets(kind: type = RunConfig) -> dict[str, Path]:
    """The presets of this kind of config, by name: of a `BatchConfig` those in configs/batch."""
    section = kind.__name__.removesuffix("Config").lower()
    folder = configs_folder() if kind is RunConfig else configs_folder() / section
    return {preset.stem: preset for preset in sorted(folder.glob("*.yaml"))}


def _find(name: str, beside: Path, kind: type) -> Path:
    """The file `name`, relative to `beside`, or else the preset called `name`."""
    file = beside / name
    if file.is_file():
        return file
    known = presets(kind)
    if name in known:
        return known[name]
    if file.is_dir():
        raise ConfigError(f"{file} is a folder, and a config is a YAML file.")
    names = f"the presets are {', '.join(known)}" if known else "one would work"
    raise ConfigError(f"there is no config file {file}; {names}.")


def _read_file(file: Path, above: tuple[Path, ...], kind: type) -> tuple[dict[str, Any], Places]:
    """A file's data on top of what it extends; `above` are the files that extend this one."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read as UTF-8 text: {error}.") from None
    places: Places = {}
    data = parse(text, lambda line: f"{file}:{line}", places)
    if not isinstance(data, dict | None):
        raise ConfigError(f"{file}:1: a config must be a mapping, such as `train: {{steps: 50}}`.")
    # A section is empty, not null, when all its lines are commented out.
    data = {
        name: {} if value is None and _keys_of(name, kind) else value
        for name, value in (data or {}).items()
    }
    if "extends" not in data:
        return data, places
    place, base = places[("extends",)], data.pop("extends")
    if not isinstance(base, str):
        raise ConfigError(f"{place}: extends must name one file or preset, such as grok-1.")
    try:
        base_file = _find(base, file.parent, kind)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None
    above = (*above, file.resolve())
    if base_file.resolve() in above:
        raise ConfigError(f"{place}: extends {base} leads back to itself; drop one `extends`.")
    base_data, base_places = _read_file(base_file, above, kind)
    return _merge(base_data, data), base_places | places


def _read_override(override: str, places: Places) -> dict[str, Any]:
    """`train.steps=50` as nested data."""
    dotted, equals, text = override.partition("=")
    key = tuple(dotted.strip().split("."))
    if not equals or not all(key):
        raise ConfigError(
            f"override `{override}` is not of the form section.key=value, such as train.steps=50."
        )
    place = f"override `{override}`"
    places.update({key[:depth]: place for depth in range(1, len(key))})
    data = parse(text, lambda _: place, places, key)
    for name in reversed(key):
        data = {name: data}
    return data


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `top` set; mappings are merged, anything else is replaced."""
    merged = dict(base)
    for name, value in top.items():
        under = merged.get(name)
        if isinstance(value, dict) and isinstance(under, dict):
            value = _merge(under, value)
        merged[name] = value
    return merged


def _check(data: Mapping[str, Any], places: Places, source: str, kind: type) -> Any:
    """Plain data as a config; of several errors, the one to mend first is raised."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(data), strict=True)
    except TypeError as error:
        raise ConfigError(f"{source} is not plain data: {error}.") from None
    except ValidationError as error:
        errors = error.errors(include_url=False)
    # A misspelt key is both unknown and missing; a rule is broken only by what is well formed.
    order = ("unexpected_keyword_argument", "", "missing", "value_error")
    first = min(errors, key=lambda e: order.index(e["type"] if e["type"] in order else ""))
    loc = tuple(str(part) for part in first["loc"])
    if first["type"] == "missing":
        absent = [e["loc"] for e in errors if e["type"] == "missing"]
        of_items = [loc for loc in absent if any(isinstance(part, int) for part in loc)]
        names = ", ".join(_name(loc) for loc in of_items or absent)
        if of_items:
            place = places.get(tuple(map(str, of_items[0][:-1])), source)
            raise ConfigError(f"{place}: {names} must be set.")
        preset = ", or taken from a preset as in `extends: grok-1`" if kind is RunConfig else ""
        raise ConfigError(f"{source}: {names} must be set{preset}.")
    if first["type"] == "value_error":
        sentence = str(first["ctx"]["error"])
        raise ConfigError(f"{_blame(sentence, places, source)}: {sentence}")
    problem = _unknown(".".join(loc), kind) if first["type"] == order[0] else _wrong(first, kind)
    raise ConfigError(f"{places.get(loc, source)}: {problem}")


def _blame(sentence: str, places: Places, source: str) -> str:
    """Where the keys that a sentence names were set: an override first, then the file itself."""
    named = (tuple(word.split(".")) for word in re.findall(r"[a-z_0-9.]+", sentence))
    found = [places[key] for key in named if key in places]
    order = ("override", f"{source}:", "")
    return min(found, key=lambda p: [p.startswith(o) for o in order].index(True), default=source)


def _unknown(key: str, kind: type) -> str:
    """A sentence on a key that does not exist: the nearest that does, or the section's keys."""
    if key == "extends":
        return "extends is a key of config files alone."
    section, _, name = key.rpartition(".")
    siblings = _keys_of(section, kind) + ([] if section else ["extends"])
    near = difflib.get_close_matches(name, siblings, 1)
    if near:
        found = [f"{section}.{near[0]}" if section else near[0]]
    else:
        last = {known: known.rpartition(".")[2] for known in schema(kind)}
        near = difflib.get_close_matches(name, last.values(), 1, cutoff=0.8)
        found = [known for known in schema(kind) if last[known] in near]
    if key in found:
        section, _, name = found[0].rpartition(".")
        return f"in a file, {key} is written as {name} inside {section}."
    if found:
        return f"there is no key {key}; did you mean {' or '.join(found)}?"
    return f"there is no key {key}; {section or 'the top level'} has {', '.join(siblings)}."


def _name(loc: Sequence[str | int]) -> str:
    """A key as people write it, such as data.datasets[0].path."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)[1:]


_WANTED = {  # pydantic's kind of error -> what it wanted, in words
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "tuple_type": "a list, such as [a.txt, b.txt]",
    "dataclass_type": "a mapping of keys",
    "literal_error": "{expected}",
    "finite_number": "a finite number",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than_equal": "at most {le:g}",
}


def expectation(error: Mapping[str, Any]) -> str | None:
    """The type or bound that a pydantic error asks for, as in "at least 0"; None if it has none."""
    words = _WANTED.get(error["type"])
    return words and words.format(**error.get("ctx", {}))


def _wrong(error: Mapping[str, Any], config: type) -> str:
    """A sentence on a value of the wrong type or size: what was wanted, given, and could be."""
    loc, kind, value = error["loc"], error["type"], error["input"]
    key = _name(loc)
    wanted = expectation(error)
    if wanted is None:
        return f"{key or 'a config'} cannot be read: {error['msg']}."
    given = json.dumps(value, ensure_ascii=False)
    given = given if len(given) <= 60 else f"{given[:60]}..."
    sentence = f"{key or 'a config'} must be {wanted}, not {given}"
    if kind == "dataclass_type":
        return f"{sentence}; its keys are {', '.join(_keys_of(key, config))}."
    meant = _meant(kind, value, wanted)
    if meant is not None:
        return f"{sentence}; did you mean {json.dumps(meant, ensure_ascii=False)}?"
    default = schema(config)[key].default if key in schema(config) else None
    return sentence + ("." if default is None else f"; the default is {json.dumps(default)}.")


def _meant(kind: str, value: Any, wanted: str) -> Any:
    """The value of the right type that the given one looks like; None if like none."""
    if kind == "tuple_type" and isinstance(value, str):
        return [value]
    if kind == "string_type" and isinstance(value, int | float):
        return json.dumps(value)
    if kind == "literal_error" and isinstance(value, str):
        return next(iter(difflib.get_close_matches(value, re.findall(r"'(.+?)'", wanted), 1)), None)
    if kind in ("int_type", "float_type") and isinstance(value, str | float):
        try:
            number = float(value)
        except ValueError:
            return None
        if number.is_integer():
            return int(number)
        return number if kind == "float_type" and math.isfinite(number) else None
    return None


def _keys_of(section: str, kind: type) -> list[str]:
    """Names of the keys directly in a section, such as data or data.datasets[0]; of the top level,
    for an empty name."""
    if item := re.fullmatch(r"(.+?)(\.\d+|\[\d+\])", section):
        each, _ = typing.get_args(schema(kind)[item[1]].kind)
        return [field.name for field in dataclasses.fields(each)]
    prefix = f"{section}." if section else ""
    return [
        key.removeprefix(prefix)
        for key in schema(kind)
        if key.startswith(prefix) and "." not in key.removeprefix(prefix)
    ]
