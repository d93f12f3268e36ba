"""Reports of runs that went well, badly, or hardly at all."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from grok.cli.report import write_report
from grok.errors import GrokError
from grok.report.plots import smooth, thin
from grok.report.recorded_run import read_run
from grok.report.tips import Curve, of_curves


def line(step: int, **more) -> dict:
    rng = np.random.default_rng(step)
    load = rng.dirichlet(np.full(4, 20.0), size=2).tolist()
    return {
        "step": step,
        "loss": 3 + 4 * 0.99**step,
        "grad_norm": 1.0,
        "grad_norm/experts": 0.8,
        "update_norm/experts": 0.01,
        "learning_rate": 1e-3,
        "router_entropy": 1.2,
        "expert_load": np.mean(load, axis=0).tolist(),
        "expert_load_layers": load,
        "tokens_per_second": 1000.0 + step,
        "mfu": 0.4,
        "tokens_seen": {"text": 128 * step},
        **more,
    }


def validation(step: int) -> dict:
    return {"step": step, "validation_loss": 4.0, "validation_bits_per_byte": 1.7}


EVENTS = [
    {"time": 0, "event": "began"},
    {"time": 0, "event": "compile", "seconds": 20},
    {"time": 20, "event": "resumed", "step": 0},
    {"time": 20, "event": "steps", "first": 0, "last": 300, "seconds": 60},
    {"time": 80, "event": "rolled_back", "step": 300},
]


def folder_of(path: Path, lines: list[dict], events: list[dict] = EVENTS, config="") -> Path:
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (path / "config.yaml").write_text(config)
    return path


LONG = [*(line(step) for step in range(2, 301, 2)), validation(300)]
OLD = [
    {"step": 10, "loss": 5.0, "expert_load": [0.5, 0.5], "grad_norm": 1.0},
    {"event": "resumed", "step": 10},
    {"step": 20, "loss": 4.0, "expert_load": [0.4, 0.6], "grad_norm": 1.0},
]
RUNS = {
    "long": (LONG, ["75.0%", "MFU", "Router entropy", "Gradient norm of each group", "1.700"]),
    "young": ([], ["No step has been logged yet"]),
    "no number": (
        [line(2, loss="NaN", grad_norm="Infinity")],
        ["at the steps 2", "No validation", "went back to"],
    ),
    "old lines": (OLD, ["process restarted"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_page_says_what_there_is(name, tmp_path):
    lines, texts = RUNS[name]
    folder = folder_of(tmp_path / "run", lines, config="train: {steps: 300}\n")
    written = write_report([str(folder)], tmp_path / "page" / "report.html")
    page = written[0].read_text()
    for text in texts:
        assert text in page
    assert ("var(--s0)" in page) == bool(lines)
    # Every colour of a figure is one of the page's, for light and for dark; text has one, too.
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        assert not re.findall(r"#[0-9a-f]{6}", re.sub(r"data:image[^\"]*", "", svg))
        for style in re.findall(r'<text style="([^"]*)"', svg):
            assert "fill: var(" in style
    # Nothing from elsewhere: no address but the names of SVG's own elements.
    assert not re.findall(r'(?:src|href)="(?!#|data:image/png)[^"]*"', page)
    assert "<script" not in page
    assert len(written) == (2 if lines else 1)


def test_text_of_a_run_is_no_part_of_the_page(tmp_path):
    folder = folder_of(tmp_path / "run", [line(1)], config='folder: "<script>alert(1)</script>"\n')
    (page, _) = write_report([str(folder)], tmp_path / "report.html")
    assert "<script>" not in page.read_text()
    assert "&lt;script&gt;" in page.read_text()


def test_runs_are_compared_by_tokens(tmp_path):
    slow = "optimizer: {peak_lr: 0.001, name: adamw}\nfolder: a\n"
    fast = "optimizer: {peak_lr: 0.004, name: adamw}\nfolder: b\nlora: {rank: 8}\n"
    one = folder_of(tmp_path / "dense", LONG, config=slow)
    other = folder_of(tmp_path / "moe", [line(step) for step in range(1, 30)], config=fast)
    path, picture = write_report([str(one), str(other)])
    # Beside the first run.
    assert (path, picture) == (
        tmp_path / "compare-dense-moe.html",
        tmp_path / "compare-dense-moe.png",
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    page = path.read_text()
    # It begins with the keys that differ, and no others.
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings[:2] == ["What differs", "Loss by tokens seen"]
    differences = page[: page.index("Loss by tokens seen")]
    assert re.findall(r"<code>([a-z_.]+)</code>", differences) == [
        *("optimizer.peak_lr", "lora.rank", "null"),
    ]
    for text in ("Router entropy", "Busiest expert over the mean", "Speed", "dense, last tenth"):
        assert text in page
    assert "dense: 75.0% of 80 s" in page
    young = folder_of(tmp_path / "young", [])
    assert len(write_report([str(young), str(young)], tmp_path / "both.html")) == 1
    assert "No key of the configs differs" in (tmp_path / "both.html").read_text()


def test_values_are_shown_under_the_pointer(tmp_path):
    folder = folder_of(tmp_path / "run", LONG)
    page = write_report([str(folder)])[0].read_text()
    titles = re.findall(r"<rect [^>]*><title>(.*?)</title></rect>", page, flags=re.DOTALL)
    loss = line(300)["loss"]
    assert f"step 300\ntraining (smoothed): {loss:.4g}\nheld-out: 4" in titles
    assert any(re.match(r"layer 1, expert 3: \d\.\d{3} of an even share", t) for t in titles)
    assert any(re.match(r"step 2( to \d+)?, layer 0, expert 0: ", t) for t in titles)


def test_strips_have_the_values_of_all_curves():
    steps_P = np.arange(1000.0)
    dense = Curve("dense", steps_P, steps_P)
    few = Curve("few", np.array([500.0]), np.array([7.0]), is_sparse=True)
    short_run = Curve("short", steps_P[:100], steps_P[:100] * 2)
    tips = of_curves([dense, few, short_run], "step")
    assert len(tips) <= 120
    assert all(a.x[1] == b.x[0] for a, b in itertools.pairwise(tips))
    assert next(tip.text for tip in tips if "few: 7" in tip.text).startswith("step 50")
    assert "short" in tips[3].text and "short" not in tips[-1].text
    assert of_curves([], "step") == []
    assert of_curves([few], "step")[0].text == "step 500\nfew: 7"


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(GrokError, match=r"is no run's folder: it has neither metrics\.jsonl"):
        read_run(tmp_path)


def test_a_thinned_curve_keeps_spikes_and_gaps():
    y_P = np.zeros(100_000)
    y_P[31_415], y_P[50_000], y_P[70_000] = 9, -9, np.inf
    x_P, thin_P = thin(np.arange(100_000.0), y_P)
    assert len(x_P) < 1100
    assert (np.nanmax(thin_P), np.nanmin(thin_P)) == (9, -9)
    assert 70_000 in x_P[np.isnan(thin_P)]


def test_smoothing_begins_without_bias_and_leaves_out_what_is_no_number():
    smoothed = smooth(np.array([5.0, np.nan, 5.0, np.inf, 5.0]))
    np.testing.assert_allclose(smoothed, 5.0)
    assert np.isnan(smooth(np.array([np.nan]))).all()
