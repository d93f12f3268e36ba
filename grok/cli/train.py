"""`grok train`."""

import dataclasses
import sys
from typing import TYPE_CHECKING

import click

from grok.cli.completion import complete_config, overrides_argument

if TYPE_CHECKING:
    from grok.config import RunConfig


@click.command()
@click.argument("config", shell_complete=complete_config("train"))
@overrides_argument("train")
@click.option(
    "--resume",
    "resume_changed",
    is_flag=True,
    help="Resume although keys of the optimizer have changed. (With the same keys, or others that "
    "may change, a run resumes by itself.)",
)
def train(config: str, overrides: tuple[str, ...], resume_changed: bool) -> None:
    """Train as CONFIG says: from scratch, or on from the newest checkpoint in its folder.

    CONFIG is a YAML file, a preset's name, or the folder of a run, which goes on. Without a key
    `folder` a run gets a new one, runs/CONFIG-TIME. Ctrl-C saves before it leaves (exit code 75).
    On several hosts, start the same command on each, with one folder for all."""
    from grok.config.load import load_config
    from grok.hardware import configure_devices, is_one_of_several
    from grok.locks.folder import check_free

    if not is_one_of_several() and (folder := load_config(config, overrides).folder):
        check_free(folder)
    from grok import compile_cache, distributed

    with distributed.exit_together():
        checked = load_config(config, overrides)
        distributed.initialize(checked, checked.train.heartbeat_timeout_seconds)
        checked = with_folder(checked, config, distributed.process_count())
        if distributed.is_primary():
            check_free(checked.folder)
        configure_devices(checked.mesh.simulated_devices // distributed.process_count())
        compile_cache.share(compile_cache.folder_for(checked.compile_cache, checked.folder))

        from grok.evaluate.in_training import open_tasks
        from grok.train.loop import StartOptions, run_training

        options = StartOptions(resume_changed=resume_changed, open_tasks=open_tasks)
        code = run_training(checked, options)
    sys.exit(code)


def with_folder(checked: "RunConfig", config: str, process_count: int) -> "RunConfig":
    """The run with a new folder where it names none; ConfigError where several processes need one
    in common."""
    from grok.config.paths import new_folder
    from grok.errors import ConfigError

    if checked.folder:
        return checked
    if process_count > 1:
        problem = f"folder names none, and the {process_count} processes of the run share one"
        right = "folder=runs/NAME on a shared disk, or at gs://, would work"
        raise ConfigError(f"{problem}, where it also resumes; {right}.")
    return dataclasses.replace(checked, folder=new_folder(config))
