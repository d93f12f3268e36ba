"""`grok replay`."""

import sys
from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--from", "first", type=click.IntRange(0), help="Checkpoint to begin from (0: none).")
@click.option(
    "--steps", type=click.IntRange(1), help="Steps to do again. Default: all that can be."
)
def replay(run: Path, first: int | None, steps: int | None) -> None:
    """Do a part of the run in folder RUN again, and compare it bit for bit.

    It is done from a checkpoint in a temporary folder, on the devices and with the config of that
    time; every loss and gradient norm that the run logged is compared. Exit code 0: all equal, 1:
    not, 2: it cannot be done.
    """
    from grok.cli.tables import make_console, make_table
    from grok.hardware import configure_devices
    from grok.train.replay import find_part, program_then_and_now
    from grok.train.replay import replay as do_again

    part = find_part(run, first, steps)
    configure_devices(part.config.mesh.simulated_devices)
    compared = do_again(part)

    console = make_console()
    table = make_table("step", "loss", "again", "grad_norm", "again", "", right=6)
    numbers = {(each.step, each.name): each for each in compared}
    for line in part.logged:
        loss, norm = (numbers.get((line["step"], name)) for name in ("loss", "grad_norm"))
        equal = all(each.equal for each in compared if each.step == line["step"])
        cells = [f"{x:.9g}" for each in (loss, norm) if each for x in (each.before, each.again)]
        table.add_row(str(line["step"]), *cells, "" if equal else "differs")
    console.print(table)
    then, now = program_then_and_now(part)
    if then != now:
        console.print(
            f"The run was made by commit {then or 'unknown'}; this is {now or 'unknown'}."
        )
    different = [each for each in compared if not each.equal]
    if not different:
        console.print(
            f"equal: {len(compared)} numbers of {len(part.logged)} logged steps, "
            f"{part.first + 1} to {part.last}, are the same to the last bit"
        )
        return
    worst = different[0]
    console.print(
        f"different: {len(different)} of {len(compared)} numbers, first {worst.name} of step "
        f"{worst.step}: {worst.before:.9g} then, {worst.again:.9g} now"
    )
    sys.exit(1)
