"""Plain data -> a config checked by pydantic; an error becomes one sentence for a person."""

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from grok.config.run import RunConfig
from grok.config.schema import keys_of, schema
from grok.config.yaml import Locations
from grok.errors import ConfigError

UNKNOWN, MISSING, RULE = "unexpected_keyword_argument", "missing", "value_error"

EXPECTED = {  # pydantic's type of error -> what a value must be
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "string_too_long": "text of {max_length} characters at most",
    "string_unicode": "valid Unicode, without half of a surrogate pair",
    "too_long": "a list of {max_length} at most",
    "dict_type": "an object of keys and values",
    "tuple_type": "a list, such as [a.txt, b.txt]",
    "dataclass_type": "a mapping of keys",
    "literal_error": "{expected}",
    "finite_number": "a finite number",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than_equal": "at most {le:.10g}",
}


def validate(data: Mapping[str, Any], locations: Locations, source: str, config_type: type) -> Any:
    """Plain data as a config of this type; ConfigError says what is wrong in it, and where: by the
    `locations` where keys were set, else by `source`."""
    try:
        return TypeAdapter(config_type).validate_json(json.dumps(data), strict=True)
    except TypeError as error:
        raise ConfigError(f"{source} is not plain data: {error}.") from None
    except ValidationError as error:
        errors = error.errors(include_url=False)
    # A misspelt key is both unknown and missing; a rule is broken only by what is well formed.
    order = (UNKNOWN, "", MISSING, RULE)
    first = min(errors, key=lambda e: order.index(e["type"] if e["type"] in order else ""))
    key = tuple(map(str, first["loc"]))
    location = locations.get(key, source)
    if first["type"] == UNKNOWN:
        problem = _unknown_key(".".join(key), config_type)
    elif first["type"] == RULE:
        problem = str(first["ctx"]["error"])
        location = _location_of_keys(problem, locations, source)
    elif first["type"] == MISSING:
        absent = [e["loc"] for e in errors if e["type"] == MISSING]
        of_items = [loc for loc in absent if any(isinstance(name, int) for name in loc)]
        location = locations.get(tuple(map(str, of_items[0][:-1])), source) if of_items else source
        problem = f"{', '.join(map(_dotted, of_items or absent))} must be set"
        if not of_items:
            problem += _ways_to_set(_dotted(absent[0]), config_type)
        problem += "."
    else:
        problem = _bad_value(first, config_type)
    raise ConfigError(f"{location}: {problem}")


def expectation(error: Mapping[str, Any]) -> str | None:
    """The type or bound that a pydantic error asks for, as in "at least 0"; None if it has none."""
    words = EXPECTED.get(error["type"])
    return words and words.format(**error.get("ctx", {}))


def _location_of_keys(sentence: str, locations: Locations, source: str) -> str:
    keys = (tuple(word.split(".")) for word in re.findall(r"[a-z_0-9.]+", sentence))
    candidates = [locations[key] for key in keys if key in locations]
    order = ("override", f"{source}:")
    return max(candidates, key=lambda at: list(map(at.startswith, order)), default=source)


def _unknown_key(key: str, config_type: type) -> str:
    """A sentence on a key that does not exist: the nearest that does, or the section's keys."""
    if key == "extends":
        return "extends is a key of config files alone."
    section, _, name = key.rpartition(".")
    siblings = keys_of(section, config_type) + ([] if section else ["extends"])
    names = {known: known.rpartition(".")[2] for known in schema(config_type)}
    below = [known for known in names if known.startswith(f"{section}.") and names[known] == name]
    sections = {known.rpartition(".")[0] for known in names}
    if inside := sorted(at for at in sections if at.endswith(f".{name}")):
        meant = inside
    elif section and below:
        meant = below
    elif near := difflib.get_close_matches(name, siblings, 1):
        meant = [f"{section}.{near[0]}" if section else near[0]]
    else:
        near = difflib.get_close_matches(name, names.values(), 1, cutoff=0.8)
        meant = [known for known in names if names[known] in near]
    if key in meant:
        section, _, name = key.rpartition(".")
        return f"in a file, {key} is written as {name} inside {section}."
    if meant:
        return f"there is no key {key}; did you mean {' or '.join(meant)}?"
    return f"there is no key {key}; {section or 'the top level'} has {', '.join(siblings)}."


def _bad_value(error: Mapping[str, Any], config_type: type) -> str:
    error_type, value, key = error["type"], error["input"], _dotted(error["loc"])
    if (expected := expectation(error)) is None:
        return f"{key or 'a config'} cannot be read: {error['msg']}."
    text = json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= 60 else f"{text[:60]}..."
    sentence = f"{key or 'a config'} must be {expected}, not {text}"
    if error_type == "dataclass_type":
        return f"{sentence}; its keys are {', '.join(keys_of(key, config_type))}."
    if (meant := _meant_value(error_type, value, expected)) is not None:
        return f"{sentence}; did you mean {json.dumps(meant, ensure_ascii=False)}?"
    default = schema(config_type)[key].default if key in schema(config_type) else None
    if default is None or default is dataclasses.MISSING:
        return f"{sentence}."
    return f"{sentence}; the default is {json.dumps(default)}."


def _meant_value(error_type: str, value: Any, expected: str) -> Any:
    """The value of the right type that this one looks like; None if like none."""
    if error_type == "tuple_type" and isinstance(value, str):
        return [value]
    if error_type == "string_type" and isinstance(value, int | float):
        return json.dumps(value)
    if error_type == "literal_error" and isinstance(value, str):
        choices = re.findall(r"'(.+?)'", expected)
        return next(iter(difflib.get_close_matches(value, choices, 1)), None)
    if error_type in ("int_type", "float_type") and isinstance(value, str | float):
        try:
            number = float(value)
        except ValueError:
            return None
        if number.is_integer():
            return int(number)
        return number if error_type == "float_type" and math.isfinite(number) else None
    return None


def _dotted(loc: Sequence[str | int]) -> str:
    """A key as people write it, such as data.datasets[0].path."""
    return "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in loc)[1:]


def _ways_to_set(key: str, config_type: type) -> str:
    if config_type is RunConfig:
        return ", or taken from a preset as in `extends: grok-1`"
    return f", for example with `{key}=...` after the config's name"
