"""YAML files and dotted overrides -> a checked config, and a config -> plain data. The files that a
file `extends` go underneath, overrides on top, and pydantic checks the result. A refusal is a
`ConfigError`, one sentence: where, which key, what is wrong, what would work."""

import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from grok.config.paths import run_folder
from grok.config.run import RunConfig
from grok.config.schema import schema
from grok.config.validate import validate
from grok.config.yaml import Locations, parse_yaml
from grok.errors import ConfigError

# Folders of the presets of each type of config.
FOLDERS = {"RunConfig": ("models", "train", "serve"), "BatchConfig": ("batch",)}


@overload
def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig: ...


@overload
def load_config[C](path: str | Path, overrides: Sequence[str], config_type: type[C]) -> C: ...


def load_config(path: Any, overrides: Any = (), config_type: Any = RunConfig) -> Any:
    """The checked config of a YAML file or bare preset name, under overrides like `train.steps=50`.
    `config_type` is the dataclass of the keys. Raises ConfigError when anything cannot work."""
    file = find_config(str(path), Path(), config_type)
    data, locations = _read_file(file, (), config_type)
    if config_type is RunConfig:
        data = run_folder(file, data)
    return from_dict(data, str(file), overrides, config_type, locations)


def from_dict(
    data: Mapping[str, Any],
    source: str = "stored config",
    overrides: Sequence[str] = (),
    config_type: type = RunConfig,
    locations: Locations | None = None,
) -> Any:
    """The checked config of plain data under overrides, inverse of `to_dict`. Errors name the place
    where a key was set, from `locations` or the override, or else `source`."""
    locations = {} if locations is None else locations
    for override in overrides:
        data = _merge(data, _read_override(override, locations))
    return validate(data, locations, source, config_type)


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


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data of dotted keys and their values, the inverse of `flatten`."""
    data: dict[str, Any] = {}
    for key, value in values.items():
        for name in reversed(key.split(".")):
            value = {name: value}
        data = _merge(data, value)
    return data


def configs_folder() -> Path:
    """The folder of the presets: inside the installed package, or beside it in the repository."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def presets(config_type: type = RunConfig) -> dict[str, Path]:
    """Files of the presets of this type of config, by name: models first."""
    folders = [configs_folder() / name for name in FOLDERS.get(config_type.__name__, ())]
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def find_config(name: str, beside: Path, config_type: type) -> Path:
    """The file `name`, relative to `beside`, or that of the run in this folder, or else the preset
    called `name`."""
    file = beside / name
    if file.is_file():
        return file
    if (of_run := file / "config.yaml").is_file():
        return of_run
    if name in (known := presets(config_type)):
        return known[name]
    if file.is_dir():
        problem = f"{file} is a folder without a config.yaml"
        raise ConfigError(f"{problem}; a YAML file, or the folder of a run, would work.")
    problem = f"there is no config file {file}"
    if near := difflib.get_close_matches(name, known, cutoff=0.8):
        raise ConfigError(f"{problem}; did you mean {' or '.join(near)}?")
    names = f"the presets are {', '.join(known)}" if known else "one would work"
    raise ConfigError(f"{problem}; {names}.")


def _read_file(
    file: Path, extended_by: tuple[Path, ...], config_type: type
) -> tuple[dict[str, Any], Locations]:
    """A file's data on top of what it extends; `extended_by` are the files that extend it."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read as UTF-8 text: {error}.") from None
    locations: Locations = {}
    data = parse_yaml(text, lambda line: f"{file}:{line}", locations)
    if not isinstance(data, dict | None):
        raise ConfigError(f"{file}:1: a config must be a mapping, such as `train: {{steps: 50}}`.")
    settings, data = schema(config_type), data or {}
    for name in settings.keys() & data.keys():
        if data[name] is None and settings[name].section is settings[name].type:
            data[name] = {}  # a section all of whose lines are commented out
    if "extends" not in data:
        return data, locations
    location, base = locations[("extends",)], data.pop("extends")
    if not isinstance(base, str):
        raise ConfigError(f"{location}: extends must name one file or preset, such as grok-1.")
    try:
        base_file = find_config(base, file.parent, config_type)
    except ConfigError as error:
        raise ConfigError(f"{location}: {error}") from None
    extended_by = (*extended_by, file.resolve())
    if base_file.resolve() in extended_by:
        raise ConfigError(f"{location}: extends {base} leads back to itself; drop one `extends`.")
    base_data, base_locations = _read_file(base_file, extended_by, config_type)
    return _merge(base_data, data), base_locations | locations


def _read_override(override: str, locations: Locations) -> dict[str, Any]:
    dotted, equals, text = override.partition("=")
    key = tuple(dotted.strip().split("."))
    if not equals or not all(key):
        problem = f"override `{override}` is not of the form section.key=value"
        raise ConfigError(f"{problem}, such as train.steps=50.")
    location = f"override `{override if len(override) <= 100 else f'{override:.97}...'}`"
    locations.update({key[:depth]: location for depth in range(1, len(key))})
    return nest({".".join(key): parse_yaml(text, lambda _: location, locations, key)})


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `top` set; mappings are merged, anything else is replaced."""
    merged = dict(base)
    for name, value in top.items():
        below = merged.get(name)
        if isinstance(value, dict) and isinstance(below, dict):
            value = _merge(below, value)
        merged[name] = value
    return merged
