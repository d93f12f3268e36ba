"""Configs as text: one as YAML with the meaning beside each key, and the reference of all keys."""

import dataclasses
import json
import re
from typing import Any

from grok.config.infer import BatchConfig, ServeConfig
from grok.config.run import RunConfig
from grok.config.schema import Setting, describe, schema

HEAD = """# Configuration reference

Every key with its values, default and meaning. `grok config --reference > docs/configuration.md`
generates this page; `grok config CONFIG` prints a resolved config with the same meanings.

A key is set in a YAML file, nested by its dots, or on the command line, as in `train.steps=50`.
`extends: PRESET` in a file takes everything else from a preset or another file.
"""

COMMANDS = {
    "Runs: `grok train`, `grok plan`, `grok export`": RunConfig,
    "Batch inference: `grok batch`": BatchConfig,
    "Serving: `grok serve`": ServeConfig,
}


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
        rows.append((f"{'  ' * len(sections)}{name}: {as_yaml(value)}", comment))
    width = max(len(line) for line, _ in rows if len(line) <= 48)
    return "".join(f"{line:{width}}  # {comment}\n" for line, comment in rows)


def as_yaml(value: Any) -> str:
    """A value as YAML on one line: text bare where that cannot be taken for anything else."""
    bare = re.compile(r"(?!(true|false|null)$)[a-z][\w./-]*", re.ASCII | re.IGNORECASE)
    if isinstance(value, str) and bare.fullmatch(value):
        return value
    return json.dumps(value, ensure_ascii=False, default=dataclasses.asdict)


def reference() -> str:
    """The whole page; a section that a config has in common with an earlier one is linked."""
    lines = [HEAD]
    written: dict[type, str] = {}
    for title, config_type in COMMANDS.items():
        lines += [f"## {title}", ""]
        values = [(k, s) for k, s in schema(config_type).items() if "." not in k and not s.section]
        lines += _table(values)
        for name, setting in schema(config_type).items():
            if setting.section is None or "." in name:
                continue
            if setting.section in written:
                above = written[setting.section]
                lines += [f"`{name}.*`: {setting.meaning}; keys as [above](#{above}).", ""]
                continue
            written[setting.section] = name
            lines += [f"### {name}", "", f"{setting.meaning[0].upper()}{setting.meaning[1:]}.", ""]
            lines += _table([(f"{name}.{key}", s) for key, s in schema(setting.section).items()])
    return "\n".join(lines).rstrip() + "\n"


def _table(settings: list[tuple[str, Setting]]) -> list[str]:
    lines = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for key, setting in settings:
        if setting.section is not None:
            continue
        lines.append(_row(key, setting))
        if setting.item is not None:
            items = schema(setting.item).items()
            lines += [_row(f"{key}[].{name}", inner) for name, inner in items]
    return [*lines, ""] if len(lines) > 2 else []


def _row(key: str, setting: Setting) -> str:
    default = "must be set"
    if setting.default is not dataclasses.MISSING:
        default = "" if setting.default in (None, "", ()) else f"`{json.dumps(setting.default)}`"
    meaning = setting.meaning.replace("|", "\\|")
    return f"| `{key}` | {setting.values} | {default} | {meaning} |"
