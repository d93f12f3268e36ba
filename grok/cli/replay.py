"""`grok replay`."""

import sys
from pathlib import Path

import click

from grok.cli.options import COUNT, COUNT_OR_ZERO, HomePath


@click.command()
@click.argument("run", type=HomePath(path_type=Path))
@click.option("--from", "first", type=COUNT_OR_ZERO, help="Checkpoint to begin from (0: none).")
@click.option("--steps", type=COUNT, help="Steps to repeat; default: all that can be.")
def replay(run: Path, first: int | None, steps: int | None) -> None:
    """Repeat steps of the run in folder RUN and compare them bit for bit.

    They start from a checkpoint, in a temporary folder, on the devices and with the config of that
    time; every loss and gradient norm that the run logged is compared. Exit code 0: all equal, 1:
    some differ, 2: refused."""
    from grok.cli.tables import make_console, make_table
    from grok.hardware import configure_devices
    from grok.train.replay import find_segment
    from grok.train.replay import replay as run_replay
    from grok.train.telemetry.run_manifest import code_version, describe_commit

    segment = find_segment(run, first, steps)
    configure_devices(segment.config.mesh.simulated_devices)
    comparisons = run_replay(segment)

    console = make_console()
    table = make_table("step", "loss", "again", "grad_norm", "again", "", right=6)
    for line in segment.logged:
        of_step = {c.name: c for c in comparisons if c.step == line["step"]}
        shown = [of_step[name] for name in ("loss", "grad_norm") if name in of_step]
        cells = [f"{value:.9g}" for c in shown for value in (c.logged, c.replayed)]
        equal = all(c.equal for c in of_step.values())
        table.add_row(str(line["step"]), *cells, "" if equal else "differs")
    console.print(table)
    then, now = describe_commit(segment.process), describe_commit(code_version())
    if then != now:
        console.print(f"The run was made by commit {then}; this is {now}.")
    different = [c for c in comparisons if not c.equal]
    if not different:
        console.print(
            f"equal: {len(comparisons)} numbers of {len(segment.logged)} logged steps, "
            f"{segment.first + 1} to {segment.last}, are the same to the last bit"
        )
        return
    first_of = different[0]
    console.print(
        f"different: {len(different)} of {len(comparisons)} numbers, first {first_of.name} of "
        f"step {first_of.step}: {first_of.logged:.9g} then, {first_of.replayed:.9g} now"
    )
    sys.exit(1)
