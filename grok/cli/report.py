"""`grok report`."""

from pathlib import Path

import click


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The page to write; its picture gets the same name. Default: report.html in RUN, or of "
    "several runs compare.html in this folder.",
)
def report(runs: tuple[str, ...], out: Path | None) -> None:
    """Write a page about a run: one HTML file with curves, loads of the experts, goodput,
    checkpoints and config, and a PNG of the main curves.

    RUN is the folder of a run, finished or not. Several are compared by tokens seen.
    """
    from grok.report.write import write_report

    default = Path(runs[0]) / "report.html" if len(runs) == 1 else Path("compare.html")
    for path in write_report(runs, out or default):
        click.echo(path)
