"""`grok config`: the whole resolved config, each key with its meaning."""

import json
import os
import re
from typing import Any

import click


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[OVERRIDE]...")
def config(config: str, overrides: tuple[str, ...]) -> None:
    """Print every setting of CONFIG, a YAML file or a preset's name, as YAML.

    An OVERRIDE sets one key, as in train.steps=50. The output is itself a config file.
    """
    from grok.config_files import describe, load_config, schema

    run = load_config(config, overrides)
    rows = []
    section = ""
    for key, value, meaning in describe(run):
        parent, _, name = key.rpartition(".")
        if parent and parent != section:
            rows.append((f"{parent}:", schema()[parent].meaning))
        section = parent
        rows.append((f"{'  ' if parent else ''}{name}: {_yaml(value)}", meaning))
    total, active = run.model.num_parameters(), run.model.num_active_parameters()
    width = max(len(line) for line, _ in rows if len(line) <= 48)
    lines = [f"{line:{width}}  {click.style('# ' + meaning, dim=True)}" for line, meaning in rows]
    lines.append(f"# {total:,} parameters, {active:,} active per token")
    # Styles are dropped where the output is no terminal.
    click.echo("\n".join(lines), color=False if os.environ.get("NO_COLOR") else None)


def _yaml(value: Any) -> str:
    """A value as YAML on one line: text bare where that cannot be taken for anything else."""
    bare = re.compile(r"(?!(true|false|null)$)[a-z][\w./-]*", re.ASCII | re.IGNORECASE)
    if isinstance(value, str) and bare.fullmatch(value):
        return value
    return json.dumps(value, ensure_ascii=False)
