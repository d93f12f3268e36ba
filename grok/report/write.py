"""Reads folders of runs and writes the report of them."""

from collections.abc import Sequence
from pathlib import Path

from grok.report.one_run import one_run, one_run_png
from grok.report.recorded_run import read_run
from grok.report.several_runs import several_runs, several_runs_png


def write_report(folders: Sequence[str], out: Path) -> list[Path]:
    """Writes the page `out` about one run, or several beside each other, and where a step was
    logged a picture of its main curves beside it; the paths of what was written.

    GrokError where a folder is no run's.
    """
    runs = [read_run(folder) for folder in folders]
    html = one_run(runs[0]) if len(runs) == 1 else several_runs(runs)
    picture = one_run_png(runs[0]) if len(runs) == 1 else several_runs_png(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")
    if picture is None:
        return [out]
    out.with_suffix(".png").write_bytes(picture)
    return [out, out.with_suffix(".png")]
