"""`grok`: the group of commands, and how errors leave it.

Command modules import what is heavy inside their function bodies, so that help is instant.
"""

from typing import Any

import click

from grok import __version__
from grok.cli.batch import batch
from grok.cli.config import config
from grok.cli.data import data
from grok.cli.eval_ import eval_
from grok.cli.export import export
from grok.cli.import_ import import_
from grok.cli.inspect import inspect
from grok.cli.plan import plan
from grok.cli.quickstart import quickstart
from grok.cli.replay import replay
from grok.cli.report import report
from grok.cli.sample import sample
from grok.cli.serve import serve
from grok.cli.train import train
from grok.cli.verify import verify
from grok.errors import GrokError


class _Group(click.Group):
    """A group that ends with a sentence, not a stack trace, where the user can mend the error."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except GrokError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except OSError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)  # 128 + SIGINT, as shells count it


@click.group(cls=_Group, name="grok", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="grok")
def main() -> None:
    """Grok-1 on TPUs: training and inference."""


for command in (
    quickstart,
    config,
    train,
    plan,
    replay,
    report,
    sample,
    batch,
    serve,
    eval_,
    data,
    import_,
    export,
    inspect,
    verify,
):
    main.add_command(command)
