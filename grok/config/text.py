"""A config as YAML text: every key with its meaning beside it, ready to be read again."""

import dataclasses
import json
import re
from typing import Any

from grok.config.schema import describe, schema


def to_yaml(config: Any) -> str:
    """The whole resolved config, a comment behind each key."""
    rows: list[tuple[str, str]] = []
    settings, path = schema(type(config)), [""]
    for key, value, comment in describe(config):
        *sections, name = key.split(".")
        for depth in range(len(sections)):
            if sections[: depth + 1] != path[: depth + 1]:
                section = ".".join(sections[: depth + 1])
                rows.append((f"{'  ' * depth}{sections[depth]}:", settings[section].meaning))
        path = sections
        rows.append((f"{'  ' * len(sections)}{name}: {_scalar(value)}", comment))
    width = max(len(line) for line, _ in rows if len(line) <= 48)
    return "".join(f"{line:{width}}  # {comment}\n" for line, comment in rows)


def _scalar(value: Any) -> str:
    """A value as YAML on one line: text bare where that cannot be taken for anything else."""
    bare = re.compile(r"(?!(true|false|null)$)[a-z][\w./-]*", re.ASCII | re.IGNORECASE)
    if isinstance(value, str) and bare.fullmatch(value):
        return value
    return json.dumps(value, ensure_ascii=False, default=dataclasses.asdict)
