"""Reads folders of runs and writes the report of them."""

from collections.abc import Sequence
from pathlib import Path

from grok.report.comparison_page import comparison_page, comparison_png
from grok.report.recorded_run import read_run
from grok.report.run_page import run_page, run_png


def write_report(folders: Sequence[str], out: Path) -> list[Path]:
    """Writes the page `out` about one run, or a comparison of several, and where a step was logged
    a PNG of the main curves beside it; returns the paths written.

    GrokError where a folder is no run's.
    """
    runs = [read_run(folder) for folder in folders]
    html = run_page(runs[0]) if len(runs) == 1 else comparison_page(runs)
    picture = run_png(runs[0]) if len(runs) == 1 else comparison_png(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")
    if picture is None:
        return [out]
    out.with_suffix(".png").write_bytes(picture)
    return [out, out.with_suffix(".png")]
