"""`grok report`."""

from collections.abc import Sequence
from pathlib import Path

import click

from grok.cli.options import PATH, HomePath


@click.command()
@click.argument("runs", type=PATH, nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--out",
    type=HomePath(dir_okay=False, path_type=Path),
    help="The page to write; its picture gets the same name. Default: report.html in RUN, or of "
    "several runs compare.html in this folder.",
)
def report(runs: tuple[str, ...], out: Path | None) -> None:
    """Write a page about a run: one HTML file with curves, loads of the experts, goodput,
    checkpoints and config, and a PNG of the main curves.

    RUN is the folder of a run, finished or not. Several are compared by tokens seen."""
    default = Path(runs[0]) / "report.html" if len(runs) == 1 else Path("compare.html")
    for path in write_report(runs, out or default):
        click.echo(path)


def write_report(folders: Sequence[str], out: Path) -> list[Path]:
    """Writes the page `out` about one run or several, and a PNG beside it where a step was logged;
    returns the paths written. GrokError where a folder is no run's."""
    from grok.report.pages import comparison_page, comparison_png, run_page, run_png
    from grok.report.recorded_run import read_run

    runs = [read_run(folder) for folder in folders]
    html = run_page(runs[0]) if len(runs) == 1 else comparison_page(runs)
    picture = run_png(runs[0]) if len(runs) == 1 else comparison_png(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")
    if picture is None:
        return [out]
    out.with_suffix(".png").write_bytes(picture)
    return [out, out.with_suffix(".png")]
