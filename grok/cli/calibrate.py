"""`grok calibrate`: what the devices here really do, in a file for `grok plan`."""

import sys

import click

from grok.cli.completion import complete_config, overrides_argument
from grok.cli.options import PATH

PARTS = ("kernels", "rates", "steps")


@click.command()
@click.argument("config", required=False, shell_complete=complete_config("train"))
@overrides_argument("train")
@click.option("--out", type=PATH, metavar="FILE", help="JSON file to write, here or at gs://.")
@click.option(
    "--only",
    type=click.Choice(PARTS),
    multiple=True,
    help="A part to measure; may be repeated. Default: all. Steps need rates.",
)
@click.option(
    "--cpu-time",
    is_flag=True,
    help="On a busy CPU: count this process's seconds of CPU time, which other programs disturb "
    "little.",
)
def calibrate(
    config: str | None,
    overrides: tuple[str, ...],
    out: str | None,
    only: tuple[str, ...],
    cpu_time: bool,
) -> None:
    """Check every kernel and measure the devices that are here; end with a verdict.

    Kernels are compared with their references (interpreted where there is no TPU); rates are those
    of products, memory, collectives and the way to the host; a training and a decode step of
    CONFIG, by default a preset that suits the devices, are timed beside their plans. `grok plan
    --calibration FILE` plans with the rates. On several hosts, start the same command on each. Exit
    code 65: a kernel is wrong."""
    from grok import distributed
    from grok.config.load import load_config
    from grok.errors import DIVERGED, ConfigError
    from grok.hardware import configure_devices
    from grok.progress import phase_progress

    if config is not None and "=" in config:
        overrides, config = (config, *overrides), None
    parts = only or PARTS
    if "steps" in parts and "rates" not in parts:
        raise ConfigError("--only steps has no rates to plan with; --only rates --only steps has.")
    with distributed.exit_together():
        named = load_config(config or "grok-10m", overrides)
        distributed.initialize(named, named.train.heartbeat_timeout_seconds)
        configure_devices(named.mesh.simulated_devices // distributed.process_count())

        from grok.calibrate.run import calibrate as measure
        from grok.plan.calibration import check_writable, write_calibration

        if cpu_time:
            check_cpu()
        if out and distributed.is_primary():
            check_writable(out)
        with phase_progress("calibrate") as on_phase:
            result = measure(config, overrides, parts, cpu_time, on_phase)
        wrong = any(kernel["is_wrong"] for kernel in result.kernels)
        if distributed.is_primary():
            click.echo("\n".join(result.verdict))
            if out:
                write_calibration(result, out)
                click.echo(f"written: {out}")
        distributed.barrier()
    sys.exit(DIVERGED if wrong else 0)


def check_cpu() -> None:
    """Refuses, as ConfigError, to count a CPU's time where another device works."""
    import jax

    from grok.errors import ConfigError

    if (platform := jax.default_backend()) != "cpu":
        raise ConfigError(f"--cpu-time is of CPUs, and the devices are {platform}s; leave it out.")
