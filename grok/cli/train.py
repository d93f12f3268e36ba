"""`grok train`."""

import sys

import click


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def train(config: str, overrides: tuple[str, ...]) -> None:
    """Train as CONFIG says: from scratch, or on from the newest checkpoint in its folder.

    CONFIG is a YAML file or a preset's name. Ctrl-C saves before it leaves (exit code 75).
    """
    from grok.config_files import load_config

    checked = load_config(config, overrides)

    from grok.devices import prepare

    prepare(checked.mesh.simulated_devices)

    from grok.train.loop import run

    sys.exit(run(checked))
