"""A config as YAML text: every key with its meaning beside it, ready to be read again."""

import dataclasses
import json
import re
from typing import Any

from grok.config import RunConfig
from grok.config.load import describe, schema


def to_yaml(config: Any) -> str:
    """The whole resolved config, a comment behind each key; of a run, parameter counts in the last
    line."""
    rows, section = [], ""
    sections = schema(config.__class__)
    for key, value, meaning in describe(config):
        parent, _, name = key.rpartition(".")
        if parent and parent != section:
            rows.append((f"{parent}:", sections[parent].meaning))
        section = parent
        rows.append((f"{'  ' if parent else ''}{name}: {_scalar(value)}", meaning))
    width = max(len(line) for line, _ in rows if len(line) <= 48)
    lines = [f"{line:{width}}  # {meaning}" for line, meaning in rows]
    if isinstance(config, RunConfig):
        total, active = config.model.num_parameters(), config.model.num_active_parameters()
        lines.append(f"# {total:,} parameters, {active:,} active per token")
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    """A value as YAML on one line: text bare where that cannot be taken for anything else."""
    bare = re.compile(r"(?!(true|false|null)$)[a-z][\w./-]*", re.ASCII | re.IGNORECASE)
    if isinstance(value, str) and bare.fullmatch(value):
        return value
    return json.dumps(value, ensure_ascii=False, default=dataclasses.asdict)
