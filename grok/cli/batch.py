"""`grok batch`."""

import click

from grok.cli.completion import complete_config, overrides_argument
from grok.cli.options import PATH


@click.command()
@click.argument(
    "config", metavar="RUN_OR_CONFIG", type=PATH, shell_complete=complete_config("batch")
)
@overrides_argument("batch")
def batch(config: str, overrides: tuple[str, ...]) -> None:
    """Answer the requests in files of JSON lines or Parquet.

    RUN_OR_CONFIG is a YAML file or a preset's name, or the folder of a run or of other weights, to
    which input=[FILE] and output=FOLDER are added. After an interruption, the same command computes
    only the missing shards; Ctrl-C exits with code 75. On several hosts, start the same command on
    each."""
    from grok.config.batch import load_batch_config
    from grok.hardware import is_one_of_several
    from grok.locks.folder import check_free

    checked = load_batch_config(config, overrides)
    if not is_one_of_several():
        check_free(checked.output)

    click.echo("loading JAX", err=True)
    from grok.batch.runner import join_replica

    with join_replica(checked) as replica:
        from grok.batch.runner import run

        run(checked, replica)
