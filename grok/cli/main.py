"""`grok`: the group of commands, and how errors leave it. Command modules import what is heavy
inside their function bodies, so that help is instant."""

import contextlib
import importlib
import os
import sys
from typing import Any

import click

from grok import __version__
from grok.cli.groups import Group
from grok.errors import GrokError
from grok.terminal import for_stream

COMMANDS = (  # a module each, with a function of that name
    "quickstart config train plan calibrate replay report profile sample chat batch serve "
    "eval_ data import_ export inspect verify"
)


class _Group(Group):
    """A group that ends with a sentence, not a stack trace, where the user can mend the error."""

    _has_failed = False

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Runs the command of this process. After an error it ends at once: at its end, Python
        would wait for threads of libraries that themselves wait for what failed."""
        try:
            return super().__call__(*args, **options)
        except SystemExit as end:
            if self._has_failed:
                for stream in (sys.stdout, sys.stderr):
                    with contextlib.suppress(OSError):
                        stream.flush()
                os._exit(end.code if isinstance(end.code, int) else 1)
            raise

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (GrokError, OSError) as error:
            self._has_failed = True
            click.echo(for_stream(f"error: {error}", sys.stderr), err=True)
            ctx.exit(error.exit_code if isinstance(error, GrokError) else 1)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)  # 128 + SIGINT, as shells count it


@click.group(cls=_Group, name="grok", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="grok")
def main() -> None:
    """Train and serve Grok-1 and the open models of its kind, on TPUs, GPUs and CPUs.

    `grok COMMAND --help` has options and an example."""


for name in COMMANDS.split():
    main.add_command(getattr(importlib.import_module(f"grok.cli.{name}"), name))
