"""Sections of a run's report: curves, expert load, goodput, processes, checkpoints, config."""

import datetime
import functools

import numpy as np
from markupsafe import Markup

from grok.errors import DONE, SAVED
from grok.progress import duration
from grok.report import page, plots
from grok.report.plots import Draw
from grok.report.recorded_run import RecordedRun, final_points, imbalance
from grok.train.telemetry.event_log import Goodput
from grok.train.telemetry.host_times import slow_host
from grok.train.telemetry.run_manifest import describe_commit

SMALL, BROAD = (470, 280), (1000, 340)  # pixels
# Name and colour of each kind of time in `grok.train.telemetry.event_log`.
TIME_KINDS = {
    "useful": ("steps that count", "s2"),
    "lost": ("steps done again", "bad"),
    "start": ("start", "s7"),
    "data": ("waiting for data", "s1"),
    "restore": ("reading a checkpoint", "s4"),
    "compile": ("compiling (with its first step)", "s6"),
    "validate": ("validation", "s0"),
    "sdc_check": ("comparing devices (SDC check)", "muted"),
    "save": ("saving (while the loop waited)", "s3"),
    "profile": ("profiling", "s5"),
    "down": ("between processes", "muted"),
    "other": ("other", "grid"),
}
HELD_OUT_DOMAIN = "validation_bits_per_byte"  # and the name of the domain, in metrics


def draw_metric(run: RecordedRun, key: str, unit: str, marks: plots.Marks) -> Draw | None:
    """A drawing of a training metric, the loss with the held-out one; None without points."""
    steps_P, values_P = run.series(key)
    if not len(steps_P):
        return None
    if key == "learning_rate":
        series = [plots.Series("", steps_P, values_P)]
    else:
        series = plots.raw_and_smooth("training" if key == "loss" else "", steps_P, values_P)
    if key == "loss" and run.validation:
        series.append(_held_out(run, "validation_loss"))
    return lambda axes: plots.draw_curves(axes, series, "step", unit, marks)


def _held_out(run: RecordedRun, key: str) -> plots.Series:
    return plots.Series("held-out", *run.series(key, "validation"), plots.HELD_OUT_COLOR, "dots")


def _measured(run: RecordedRun, prefix: str) -> list[plots.Series]:
    """A curve of each metric `prefix/NAME` of validation passes."""
    return [
        plots.Series(name, *run.series(f"{prefix}/{name}", "validation"), number, "dots")
        for number, name in enumerate(run.groups(prefix, "validation"))
    ]


def svg_figure(title: str, draw: Draw, size: tuple[int, int] = SMALL) -> page.Figure:
    """A figure of the page; one of the page's width has a second form for phones."""
    if size[0] == SMALL[0]:
        return page.Figure(title, Markup(plots.svg(*size, draw, title)))
    narrow = plots.svg(SMALL[0], max(120, min(SMALL[1], size[1])), draw, f"{title}, narrow")
    return page.Figure(title, Markup(plots.svg(*size, draw, title)), Markup(narrow))


def loss_section(run: RecordedRun, marks: plots.Marks) -> page.Section:
    """Training and held-out loss."""
    draw = draw_metric(run, "loss", "nats per token", marks)
    if draw is None:
        return page.Section("Loss", ["No step has been logged yet."])
    paragraphs = [] if run.validation else ["No validation pass so far."]
    return page.Section("Loss", paragraphs, [svg_figure("Loss", draw, BROAD)])


def curves_section(run: RecordedRun, marks: plots.Marks) -> page.Section | None:
    """Held-out bits per byte, norms, learning rate, router, speed."""
    drawings: dict[str, Draw | None] = {}
    held_out = [_held_out(run, "validation_bits_per_byte"), *_measured(run, HELD_OUT_DOMAIN)]
    held_out = [curve for curve in held_out if len(curve.x_P)]
    if held_out:
        labels = ("step", "bits per byte", marks)
        drawings["Held-out text"] = lambda axes: plots.draw_curves(axes, held_out, *labels)
    if scores := _measured(run, "tasks"):
        drawings["Tasks"] = lambda axes: plots.draw_curves(axes, scores, "step", "", marks)
    for prefix, title in (("grad_norm", "Gradient norm"), ("update_norm", "Update norm")):
        series = [
            plots.Series(name, *run.series(f"{prefix}/{name}"), number)
            for number, name in enumerate(run.groups(prefix))
        ]
        if series:
            drawings[f"{title} of each group of parameters"] = functools.partial(
                plots.draw_curves, series=series, x_label="step", y_label="", marks=marks,
                log=any(np.any(curve.y_P > 0) for curve in series),
            )  # fmt: skip
    for key, title, unit in (
        ("learning_rate", "Learning rate", ""),
        ("grad_norm", "Gradient norm", "before clipping"),
        ("param_norm", "Parameter norm", ""),
        ("router_entropy", "Router entropy", "nats"),
        ("router_balance", "Router balance", "1: even"),
        ("tokens_per_second", "Speed", "tokens per second"),
        ("mfu", "MFU", "share of peak FLOP/s"),
    ):
        drawings[title] = draw_metric(run, key, unit, marks)
    figures = [svg_figure(title, draw) for title, draw in drawings.items() if draw is not None]
    title = "Held-out text, optimizer, router, speed"
    return page.Section(title, figures=figures) if figures else None


def load_section(run: RecordedRun) -> page.Section | None:
    """Balance of the router over its experts: at the end, and over time."""
    steps_P, load_PLE = run.loads()
    if not len(steps_P):
        return None
    L, E = load_PLE.shape[1:]
    count = final_points(len(steps_P))
    last_LE = load_PLE[-count:].mean(axis=0)
    height = int(min(900, max(180, 60 + 14 * L * E)))
    figures = [
        svg_figure(
            f"Each expert's load, mean of steps {steps_P[-count]:.0f} to {steps_P[-1]:.0f}",
            lambda axes: plots.draw_load(axes, last_LE),
            (BROAD[0], min(900, 90 + 26 * L)),
        ),
        svg_figure(
            "Each expert's load over time",
            lambda axes: plots.draw_load_over_time(axes, steps_P, load_PLE),
            (BROAD[0], height),
        ),
    ]
    imbalance_P = imbalance(load_PLE)
    finite_P = imbalance_P[np.isfinite(imbalance_P)]
    paragraphs = [f"Multiples of an even share, 1/{E} of the tokens that were routed."]
    if len(finite_P):
        averaged = f", averaged over {L} layers" if L > 1 else ""
        paragraphs.append(
            f"Most used expert over the mean{averaged}: {finite_P.mean():.2f} over the run, "
            f"{finite_P[-count:].mean():.2f} at its end."
        )
    return page.Section("Load of the experts", paragraphs, figures, heat_scale=True)


def goodput_section(run: RecordedRun) -> page.Section | None:
    """Wall time by what it was spent on."""
    goodput = run.goodput
    if goodput is None or not goodput.total:
        return None
    bar, rows = goodput_bar(goodput), []
    for name, percent, _ in bar:
        rows.append((name, duration(percent / 100 * goodput.total), f"{percent:.1f}%"))
    paragraph = (
        f"Goodput {goodput.share:.1%}: of {duration(goodput.total)} of wall time, over all "
        "processes and the gaps between them, that share was spent on steps that are part of the "
        "result."
    )
    table = page.Table(rows, ("", "time", "share"), (1, 2), colors=[color for *_, color in bar])
    return page.Section("Goodput", [paragraph], tables=[table], bars={"": bar})


def goodput_bar(goodput: Goodput) -> list[tuple[str, float, str]]:
    """Name, percent and colour of each kind of time that counts for something."""
    shares = {kind: seconds / goodput.total for kind, seconds in goodput.seconds.items()}
    return [
        (TIME_KINDS[kind][0], round(100 * share, 3), TIME_KINDS[kind][1])
        for kind, share in shares.items()
        if share >= 0.0005
    ]


def processes_section(run: RecordedRun) -> page.Section | None:
    """The processes that worked on the run, and the updates that were skipped."""
    rows = [
        (
            format_time(start["began"]),
            format_time(start["ended"]),
            f"{start['first_step']} to {start['last_step']}",
            describe_exit(start["exit_code"]),
            "{count} x {kind}".format(**{"count": None, "kind": None, **start.get("devices", {})}),
            describe_commit(start),
        )
        for start in run.manifest.get("starts", ())
    ]
    bad_steps = run.bad_steps()
    paragraphs = []
    if bad_steps:
        steps = ", ".join(map(str, bad_steps[:30])) + (", ..." if len(bad_steps) > 30 else "")
        paragraphs.append(f"{len(bad_steps)} updates skipped or not finite, at the steps {steps}.")
    elif run.training:
        paragraphs.append("No update was skipped at a logged step.")
    if sentence := slow_host(run.training[-1] if run.training else {}):
        paragraphs.append(f"At step {run.training[-1]['step']}, {sentence}.")
    for event in run.events:
        if event["event"] == "rolled_back":
            paragraphs.append(f"The run went back to the checkpoint of step {event['step']}.")
    if not rows and not paragraphs:
        return None
    header = ("began", "ended", "steps", "exit", "devices", "commit")
    tables = [page.Table(rows, header, code_columns=[5])] if rows else []
    return page.Section("Processes and skipped updates", paragraphs, tables=tables)


def checkpoints_section(run: RecordedRun) -> page.Section | None:
    """Every checkpoint that was written, kept or deleted since."""
    folder = run.folder / "checkpoints"
    on_disk = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    saved = run.manifest.get("checkpoints", {})
    steps = sorted({*saved, *(name for name in on_disk if name.isdecimal())}, key=int)
    if not steps:
        return None
    rows = [
        (
            step,
            f"{saved[step]['files']:,}" if step in saved else "",
            f"{saved[step]['bytes'] / 1e6:,.1f} MB" if step in saved else "",
            "kept" if step in on_disk else "deleted",
            saved[step]["sha256"][:16] if step in saved else "",
        )
        for step in steps
    ]
    header = ("step", "files", "size", "", "SHA-256 of names, sizes and indices")
    return page.Section("Checkpoints", tables=[page.Table(rows, header, (0, 1, 2), [4])])


def config_section(run: RecordedRun) -> page.Section:
    """The config, the data and the software."""
    config, summary = list(run.config.items()), f"config, {len(run.config)} keys"
    tables = [page.Table(config, ("key", "value"), code_columns=[0], summary=summary)]
    data = [
        (name, path, digest[:16])
        for source in run.manifest.get("data", ())
        for (name, path), (_, digest) in [source.items()]
    ]
    if data:
        tables.append(page.Table(data, ("", "path", "SHA-256"), code_columns=[2], summary="data"))
    for start in run.manifest.get("starts", ())[-1:]:
        versions = {"grok": start["grok"], "python": start["python"], **start["packages"]}
        header, summary = ("package", "version"), "software of the last start"
        tables.append(page.Table(list(versions.items()), header, summary=summary))
    return page.Section("Configuration", tables=tables)


def describe_exit(code: int | None) -> str:
    """Meaning of a process's exit code; None where no end is recorded."""
    meanings = {None: "no end recorded", DONE: "finished", SAVED: "asked to stop, saved"}
    return meanings.get(code, f"ended with exit code {code}")


def format_time(time: str | None) -> str:
    """An ISO time to the minute, in UTC; empty for None."""
    if time is None:
        return ""
    return datetime.datetime.fromisoformat(time).strftime("%Y-%m-%d %H:%M UTC")
