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
    help="The page to write; its picture gets the same name.  [default: report.html in RUN; of "
    "several runs compare-RUN-RUN.html in the folder that the first RUN lies in]",
)
def report(runs: tuple[str, ...], out: Path | None) -> None:
    """Write a page about a run: one HTML file with curves, loads of the experts, goodput,
    checkpoints and config, and a PNG of the main curves.

    RUN is the folder of a run, finished or not. Of several the page begins with the config keys
    that differ, and compares them by tokens seen."""
    for path in write_report(runs, out):
        click.echo(path)


def write_report(folders: Sequence[str], out: Path | None = None) -> list[Path]:
    """Writes the page `out` about one run or several, and a PNG beside it where a step was logged;
    returns the paths written. GrokError where a folder is no run's."""
    from grok.report.comparison import comparison_page, comparison_path, comparison_png
    from grok.report.pages import run_page, run_png
    from grok.report.recorded_run import read_run

    runs = [read_run(folder) for folder in folders]
    if len(runs) == 1:
        out = out or Path(folders[0]) / "report.html"
        html, picture = run_page(runs[0]), run_png(runs[0])
    else:
        out = out or comparison_path(folders)
        html, picture = comparison_page(runs), comparison_png(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")
    if picture is None:
        return [out]
    out.with_suffix(".png").write_bytes(picture)
    return [out, out.with_suffix(".png")]
