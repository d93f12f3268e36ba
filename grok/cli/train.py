"""`grok train`."""

import sys

import click

from grok.cli.completion import complete_config, overrides_argument


@click.command()
@click.argument("config", shell_complete=complete_config("train"))
@overrides_argument("train")
def train(config: str, overrides: tuple[str, ...]) -> None:
    """Train as CONFIG says: from scratch, or on from the newest checkpoint in its folder.

    CONFIG is a YAML file or a preset's name. Ctrl-C saves before it leaves (exit code 75). On
    several hosts, start the same command on each."""
    from grok.config.load import load_config
    from grok.hardware import configure_devices, is_one_of_several
    from grok.locks.folder import check_free

    if not is_one_of_several():
        check_free(load_config(config, overrides).folder)
    from grok import compile_cache, distributed

    with distributed.exit_together():
        checked = load_config(config, overrides)
        distributed.initialize(checked, checked.train.heartbeat_timeout_seconds)
        if distributed.is_primary():
            check_free(checked.folder)
        configure_devices(checked.mesh.simulated_devices // distributed.process_count())
        compile_cache.share(compile_cache.folder_for(checked.compile_cache, checked.folder))

        from grok.train.loop import run_training

        code = run_training(checked)
    sys.exit(code)
