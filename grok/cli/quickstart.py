"""`grok quickstart`."""

import sys
from pathlib import Path

import click

from grok.cli.options import HomePath


@click.command()
@click.option(
    "--folder",
    type=HomePath(path_type=Path, file_okay=False),
    default=Path("runs/quickstart"),
    show_default=True,
    help="Folder for everything.",
)
def quickstart(folder: Path) -> None:
    """Train, stop, resume and sample a small Grok on this machine's CPU, in minutes."""
    from grok.quickstart.tour import run

    sys.exit(run(folder))
