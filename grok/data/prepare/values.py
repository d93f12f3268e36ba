"""Values of a record, from JSON or Parquet: read, checked, and made fit for JSON again."""

import json
import math
from collections.abc import Mapping
from typing import Any


class BadRecord(Exception):
    """The reason why a record has no document, as a predicate: `is not UTF-8 at byte 7`."""


def in_json(value: Any) -> Any:
    """A value of JSON or Parquet as one that every reader of JSON takes: what JSON lacks (times,
    decimals, NaN) as text, bytes as text or else in hexadecimal."""
    match value:
        case bool() | int() | str() | None:
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case bytes():
            try:
                return value.decode()
            except UnicodeDecodeError:
                return value.hex()
        case dict():
            return {str(name): in_json(inner) for name, inner in value.items()}
        case list() | tuple():
            return [in_json(inner) for inner in value]
    return str(value)


def parse_json_object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line; BadRecord where it has none."""
    text = decode(line)
    try:
        data = json.loads(text)
    except RecursionError:
        raise BadRecord("is not JSON: nested too deeply") from None
    except json.JSONDecodeError as error:
        message = error.msg.removesuffix(" at")
        raise BadRecord(f"is not JSON: {message} at column {error.colno}") from None
    except ValueError as error:
        raise BadRecord(f"is not JSON: {str(error).partition(';')[0]}") from None
    if not isinstance(data, dict):
        raise BadRecord(f"is no JSON object but {type_name(data)}")
    return data


def decode(data: bytes) -> str:
    """The text of bytes in UTF-8, without a byte-order mark; BadRecord where they are none."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecord(f"is not UTF-8 at byte {error.start} (0x{data[error.start]:02x})") from None


def field(data: Mapping[str, Any], name: str, kind: type) -> Any:
    """The value of a record's field, which must be of this kind: str or list. Raises BadRecord."""
    if name not in data:
        raise BadRecord(f"has no field `{name}`")
    if not isinstance(data[name], kind):
        expected = "text" if kind is str else "a list"
        raise BadRecord(f"field `{name}` is not {expected} but {type_name(data[name])}")
    return data[name]


def type_name(value: Any) -> str:
    """The type of a value in words of JSON."""
    names = {type(None): "null", bool: "a truth value", list: "a list", str: "text"}
    names |= {int: "a number", float: "a number", dict: "an object"}
    return names.get(type(value), type(value).__name__)
