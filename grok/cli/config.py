"""`grok config`: the whole resolved config, each key with its meaning."""

import os
import re

import click


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--of",
    "command",
    type=click.Choice(["train", "batch", "serve"]),
    default="train",
    show_default=True,
    help="The command that CONFIG is for.",
)
def config(config: str, overrides: tuple[str, ...], command: str) -> None:
    """Print every setting of CONFIG, a YAML file or a preset's name, as YAML.

    KEY=VALUE sets one key, as in train.steps=50. The output is itself a config file.
    """
    from grok.config.load import load_config
    from grok.config.text import to_yaml

    text = to_yaml(load_config(config, overrides, _kind(command)))
    dimmed = re.sub(r"# .*$", lambda comment: click.style(comment[0], dim=True), text, flags=re.M)
    # Styles are dropped where the output is no terminal.
    click.echo(dimmed, nl=False, color=False if os.environ.get("NO_COLOR") else None)


def _kind(command: str) -> type:
    """The dataclass of a command's configs."""
    if command == "batch":
        from grok.config.batch import BatchConfig

        return BatchConfig
    if command == "serve":
        from grok.config.serve import ServeConfig

        return ServeConfig
    from grok.config import RunConfig

    return RunConfig
