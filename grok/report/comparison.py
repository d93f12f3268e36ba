"""The comparison of several runs: differing keys, curves by tokens, loads, goodput."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grok.progress import duration
from grok.report import page, plots, run_sections
from grok.report.plots import Draw
from grok.report.recorded_run import RecordedRun, final_points, imbalance
from grok.report.tips import short
from grok.train.telemetry.run_manifest import describe_commit, describe_devices

# Keys that differ between any two runs and change nothing in them.
ALWAYS_DIFFERENT = ("folder", "compile_cache")
SHOWN_CHARACTERS = 120  # of a value
SMOOTHED = ("loss", "tokens_per_second")
SMALL, BROAD = run_sections.SMALL, run_sections.BROAD


def comparison_page(runs: Sequence[RecordedRun]) -> str:
    """The HTML page of several runs."""
    loss, others = token_curves(runs)
    sections = [
        difference_section(runs),
        curves_section("Loss by tokens seen", loss),
        curves_section("Router, experts and speed by tokens seen", others),
        load_section(runs),
        goodput_section(runs),
        page.Section("At the end", tables=[final_table(runs)]),
    ]
    return page.render(
        title=" and ".join(names(runs)),
        status=(f"{len(runs)} runs", "muted"),
        sections=[section for section in sections if section is not None],
    )


def comparison_png(runs: Sequence[RecordedRun]) -> bytes | None:
    """The curves as a picture; None where there are none yet."""
    loss, others = token_curves(runs)
    return plots.png(loss | others) if loss or others else None


def names(runs: Sequence[RecordedRun]) -> list[str]:
    """A name for each run: that of its folder, or the path where two have the same."""
    short_names = [run.name for run in runs]
    return [
        run.name if short_names.count(run.name) == 1 else str(run.folder.resolve()) for run in runs
    ]


def comparison_path(folders: Sequence[str]) -> Path:
    """The page's place unless the user names one: beside the folder of the first run."""
    first, *others = (Path(folder).resolve().name for folder in folders)
    rest = others if len(others) < 3 else [f"{len(others)}-more"]
    return Path(folders[0]).resolve().parent / f"compare-{'-'.join([first, *rest])}.html"


def difference_section(runs: Sequence[RecordedRun]) -> page.Section:
    """Config keys, code and devices in which the runs differ."""
    facts = [run.config | _circumstances(run) for run in runs]
    rows = []
    for key in dict.fromkeys(key for of_run in facts for key in of_run):
        values = [_text(of_run.get(key)) for of_run in facts]
        if key not in ALWAYS_DIFFERENT and len(set(values)) > 1:
            rows.append((key, *values))
    if not rows:
        return page.Section("What differs", ["No key of the configs differs."])
    header = ("key", *names(runs))
    table = page.Table(rows, header, code_columns=range(len(header)))
    return page.Section("What differs", tables=[table])


def _circumstances(run: RecordedRun) -> dict[str, Any]:
    """Code, devices and mesh of the run's last process."""
    facts: dict[str, Any] = {}
    for start in run.manifest.get("starts", ())[-1:]:
        mesh = " x ".join(f"{axis} {size}" for axis, size in start["mesh"].items())
        facts = {"commit": describe_commit(start), "mesh": mesh}
        facts["devices"] = describe_devices(start["devices"])
    return facts


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def curves_section(title: str, curves: dict[str, Draw]) -> page.Section | None:
    """Figures of the curves; None without any."""
    figures = [
        run_sections.svg_figure(name, draw, BROAD if len(curves) < 3 else SMALL)
        for name, draw in curves.items()
    ]
    return page.Section(title, figures=figures) if figures else None


def token_curves(runs: Sequence[RecordedRun]) -> tuple[dict[str, Draw], dict[str, Draw]]:
    """Curves over tokens seen, one a run, by title: of the losses, and of all else."""
    losses = {
        "Training loss, smoothed": ("loss", "nats per token"),
        "Held-out text": ("validation_bits_per_byte", "bits per byte"),
    }
    others = {
        "Router entropy": ("router_entropy", "nats"),
        "Busiest expert over the mean": ("imbalance", "1: even"),
        "Speed, smoothed": ("tokens_per_second", "tokens per second"),
        "MFU": ("mfu", "share of peak FLOP/s"),
    }
    return _curves(runs, losses), _curves(runs, others)


def _curves(runs: Sequence[RecordedRun], metrics: dict[str, tuple[str, str]]) -> dict[str, Draw]:
    curves: dict[str, Draw] = {}
    for title, (key, unit) in metrics.items():
        series = [_series(run, key, number) for number, run in enumerate(runs)]
        labelled = [
            curve._replace(name=name)
            for curve, name in zip(series, names(runs), strict=True)
            if len(curve.x_P)
        ]
        if labelled:
            draw = functools.partial(plots.draw_curves, x_label="tokens seen")
            curves[title] = functools.partial(draw, series=labelled, y_label=unit)
    return curves


def _series(run: RecordedRun, key: str, color: int) -> plots.Series:
    """A metric of a run over the tokens that it had seen; empty where these are not known."""
    logged_P = np.array([line["step"] for line in run.training], dtype=float)
    tokens_P = run.tokens()
    is_held_out = key.startswith("validation")
    if key == "imbalance":
        steps_P, load_PLE = run.loads()
        values_P = imbalance(load_PLE) if len(steps_P) else steps_P
    else:
        steps_P, values_P = run.series(key, "validation" if is_held_out else "training")
    if not len(steps_P) or not len(tokens_P) or not np.isfinite(tokens_P).all():
        return plots.Series("", np.zeros(0), np.zeros(0), color)
    if key in SMOOTHED:
        values_P = plots.smooth(values_P)
    seen_P = np.interp(steps_P, logged_P, tokens_P)
    return plots.Series("", seen_P, values_P, color, "dots" if is_held_out else "line")


def load_section(runs: Sequence[RecordedRun]) -> page.Section | None:
    """Load of each expert at the end of each run."""
    figures = []
    for run, name in zip(runs, names(runs), strict=True):
        steps_P, load_PLE = run.loads()
        if len(steps_P):
            last_LE = load_PLE[-final_points(len(steps_P)) :].mean(axis=0)
            draw = functools.partial(plots.draw_load, load_LE=last_LE)
            size = (SMALL[0], min(900, 90 + 26 * len(last_LE)))
            figures.append(run_sections.svg_figure(f"{name}, last tenth", draw, size))
    if not figures:
        return None
    note = "Multiples of an even share of the tokens that were routed."
    return page.Section("Load of the experts", [note], figures, heat_scale=True)


def goodput_section(runs: Sequence[RecordedRun]) -> page.Section | None:
    """Wall time of each run by what it was spent on."""
    bars, times = {}, {}
    for run, name in zip(runs, names(runs), strict=True):
        if (goodput := run.goodput) is not None and goodput.total:
            bars[f"{name}: {goodput.share:.1%} of {duration(goodput.total)}"] = (
                run_sections.goodput_bar(goodput)
            )
            times[name] = goodput
    if not bars:
        return None
    rows, colors = [], []
    for kind, (label, color) in run_sections.TIME_KINDS.items():
        shares = [of_run.seconds.get(kind, 0) / of_run.total for of_run in times.values()]
        if max(shares) >= 0.0005:
            rows.append((label, *(f"{share:.1%}" for share in shares)))
            colors.append(color)
    table = page.Table(rows, ("", *times), range(1, 1 + len(times)), colors=colors)
    return page.Section("Goodput", tables=[table], bars=bars)


def final_table(runs: Sequence[RecordedRun]) -> page.Table:
    """A row for each run: its progress, and its values there."""
    rows = [(name, *_final_values(run)) for run, name in zip(runs, names(runs), strict=True)]
    header = (
        "run", "steps", "tokens seen", "loss, last tenth", "held-out loss", "bits per byte",
        "router entropy", "busiest expert", "tokens/s", "goodput", "wall time",
    )  # fmt: skip
    colors = [f"s{number % len(plots.SERIES_COLORS)}" for number in range(len(runs))]
    return page.Table(rows, header, range(1, len(header)), colors=colors)


def _final_values(run: RecordedRun) -> list[str]:
    tokens_P, goodput = run.tokens(), run.goodput
    _, load_PLE = run.loads()
    ends = {
        "loss": run.series("loss")[1],
        "entropy": run.series("router_entropy")[1],
        "load": imbalance(load_PLE) if len(load_PLE) else np.zeros(0),
    }
    means = {
        name: f"{values_P[-final_points(len(values_P)) :].mean():.4f}" if len(values_P) else ""
        for name, values_P in ends.items()
    }
    held_out = [
        f"{values_P[-1]:.4f}" if len(values_P) else ""
        for key in ("validation_loss", "validation_bits_per_byte")
        for _, values_P in [run.series(key, "validation")]
    ]
    _, speed_P = run.series("tokens_per_second")
    return [
        f"{run.last_step:,}",
        short(tokens_P[-1]) if len(tokens_P) else "",
        means["loss"],
        *held_out,
        means["entropy"],
        means["load"],
        f"{np.median(speed_P):,.0f}" if len(speed_P) else "",
        f"{goodput.share:.1%}" if goodput is not None and goodput.total else "",
        duration(goodput.total) if goodput is not None else "",
    ]
