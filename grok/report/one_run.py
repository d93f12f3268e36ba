"""The report of one run: what it is, how it went, what it cost."""

import datetime
import functools
from collections.abc import Callable

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from grok.errors import DONE, SAVED
from grok.progress import duration
from grok.report import page
from grok.report.figures import (
    Marks,
    Series,
    draw_curves,
    draw_load,
    draw_load_over_time,
    png,
    raw_and_smooth,
    short,
    svg,
)
from grok.report.recorded_run import RecordedRun

SMALL, BROAD = (470, 280), (1000, 340)
# The last share of a run's lines, over which its final figures are means.
FINAL_SHARE = 0.1
KIND_NAMES = {
    "useful": "steps that count", "lost": "steps done again", "start": "start",
    "data": "waiting for data", "restore": "reading a checkpoint",
    "compile": "compiling (with its first step)",
    "validate": "validation", "save": "saving (what the loop waited)", "profile": "profiling",
    "down": "between processes", "other": "other",
}  # fmt: skip
KIND_COLORS = {
    "useful": "s2", "lost": "bad", "start": "s6", "data": "s4", "restore": "s7", "compile": "s5",
    "validate": "s0", "save": "s3", "profile": "s1", "down": "muted", "other": "grid",
}  # fmt: skip


def one_run(run: RecordedRun) -> str:
    """The page of a run."""
    marks = Marks(run.restarts, run.bad_steps())
    sections = [
        loss_section(run, marks),
        curves_section(run, marks),
        load_section(run),
        time_section(run),
        history_section(run),
        checkpoints_section(run),
        config_section(run),
    ]
    return page.render(
        title=run.name,
        status=status(run),
        facts=facts(run),
        tiles=tiles(run),
        sections=[section for section in sections if section is not None],
    )


def one_run_png(run: RecordedRun) -> bytes | None:
    """The main curves as a picture; None before the first step was logged."""
    if not run.training:
        return None
    marks = Marks(run.restarts, run.bad_steps())
    drawings, titles = [], []
    for key, title, unit in (
        ("loss", "Loss", "nats per token"),
        ("tokens_per_second", "Speed", "tokens per second"),
        ("grad_norm", "Gradient norm", ""),
    ):
        draw = curve(run, key, unit, marks)
        if draw is not None:
            drawings.append(draw)
            titles.append(title)
    steps_P, load_PLE = run.loads()
    if len(steps_P):
        drawings.append(lambda axes: draw_load_over_time(axes, steps_P, load_PLE))
        titles.append("Load of each expert (blue: less than an even share, orange: more)")
    return png(drawings, titles)


def curve(run: RecordedRun, key: str, unit: str, marks: Marks) -> Callable[[Axes], None] | None:
    """A drawing of the training lines' `key`, with the validation loss where that is its own."""
    steps_P, values_P = run.series(key)
    if not len(steps_P):
        return None
    if key == "learning_rate":
        series = [Series("", steps_P, values_P)]
    else:
        series = raw_and_smooth("training" if key == "loss" else "", steps_P, values_P)
    if key == "loss" and run.validation:
        series.append(Series("held-out", *run.series("validation_loss", "validation"), 1, "dots"))
    return lambda axes: draw_curves(axes, series, "step", unit, marks)


def drawn(title: str, draw: Callable[[Axes], None], size: tuple[int, int] = SMALL) -> page.Figure:
    """A figure of the page; one of the page's width has a second form for phones."""
    if size == SMALL:
        return page.Figure(title, Markup(svg(*SMALL, draw, title)))
    narrow = svg(SMALL[0], max(120, min(SMALL[1], size[1])), draw, f"{title}, narrow")
    return page.Figure(title, Markup(svg(*size, draw, title)), Markup(narrow))


def loss_section(run: RecordedRun, marks: Marks) -> page.Section:
    """Training and held-out loss."""
    draw = curve(run, "loss", "nats per token", marks)
    if draw is None:
        return page.Section("Loss", ["No step has been logged yet."])
    lines = [] if run.validation else ["No validation pass so far."]
    return page.Section("Loss", lines, [drawn("Loss", draw, BROAD)])


def curves_section(run: RecordedRun, marks: Marks) -> page.Section | None:
    """Held-out bits per byte, learning rate, norms, router, speed."""
    figures = []
    steps_P, bits_P = run.series("validation_bits_per_byte", "validation")
    if len(steps_P):
        held_out = [Series("held-out", steps_P, bits_P, 1, "dots")]
        figures.append(
            drawn(
                "Held-out text",
                lambda axes: draw_curves(axes, held_out, "step", "bits per byte", marks),
            )
        )
    for prefix, title in (("grad_norm", "Gradient norm"), ("update_norm", "Update norm")):
        names = run.groups(prefix)
        series = [
            Series(name, *run.series(f"{prefix}/{name}"), number)
            for number, name in enumerate(names)
        ]
        if series:
            figures.append(
                drawn(
                    f"{title} of each group of parameters",
                    functools.partial(log_curves, series=series, marks=marks),
                )
            )
    for key, title, unit in (
        ("learning_rate", "Learning rate", ""),
        ("grad_norm", "Gradient norm", "before clipping"),
        ("param_norm", "Parameter norm", ""),
        ("router_entropy", "Router entropy", "nats"),
        ("router_balance", "Router balance", "1: even"),
        ("tokens_per_second", "Speed", "tokens per second"),
        ("mfu", "MFU", "share of peak FLOP/s"),
    ):
        draw = curve(run, key, unit, marks)
        if draw is not None:
            figures.append(drawn(title, draw))
    return page.Section("Held-out text, optimizer, router, speed", (), figures) if figures else None


def log_curves(axes: Axes, series: list[Series], marks: Marks) -> None:
    """Curves of sizes that differ by orders of magnitude."""
    draw_curves(axes, series, "step", "", marks)
    if any(np.any(each.y_P > 0) for each in series):
        axes.set_yscale("log")


def load_section(run: RecordedRun) -> page.Section | None:
    """How evenly the router used its experts: at the end, and on the way."""
    steps_P, load_PLE = run.loads()
    if not len(steps_P):
        return None
    L, E = load_PLE.shape[1:]
    count = final(len(steps_P))
    last_LE = load_PLE[-count:].mean(axis=0)
    height = int(min(900, max(180, 60 + 14 * L * E)))
    figures = [
        drawn(
            f"Each expert's load, mean of steps {steps_P[-count]:.0f} to {steps_P[-1]:.0f}",
            lambda axes: draw_load(axes, last_LE),
            (BROAD[0], min(900, 90 + 26 * L)),
        ),
        drawn(
            "Each expert's load over time",
            lambda axes: draw_load_over_time(axes, steps_P, load_PLE),
            (BROAD[0], height),
        ),
    ]
    uneven_P = (load_PLE.max(axis=2) / load_PLE.mean(axis=2)).mean(axis=1)
    finite_P = uneven_P[np.isfinite(uneven_P)]
    lines = [f"Multiples of an even share, 1/{E} of the tokens that were routed."]
    if len(finite_P):
        lines.append(
            f"Most used expert over the mean, averaged over {L} layers: {finite_P.mean():.2f} over "
            f"the run, {finite_P[-count:].mean():.2f} at its end."
            if L > 1
            else f"Most used expert over the mean: {finite_P.mean():.2f} over the run, "
            f"{finite_P[-count:].mean():.2f} at its end."
        )
    return page.Section("Load of the experts", lines, figures, heat=True)


def time_section(run: RecordedRun) -> page.Section | None:
    """What the wall time went to."""
    goodput = run.goodput
    if goodput is None or not goodput.total:
        return None
    spent = {kind: s for kind, s in goodput.seconds.items() if s >= 0.0005 * goodput.total}
    bar = [
        page.Part(KIND_NAMES[kind], round(100 * seconds / goodput.total, 3), KIND_COLORS[kind])
        for kind, seconds in spent.items()
    ]
    rows = [
        [
            page.Cell(KIND_NAMES[kind], KIND_COLORS[kind]),
            page.Cell(duration(seconds)),
            page.Cell(f"{seconds / goodput.total:.1%}"),
        ]
        for kind, seconds in spent.items()
    ]
    line = (
        f"Goodput {goodput.share:.1%}: of {duration(goodput.total)} of wall time, over all "
        "processes and the gaps between them, that much went into steps that are part of the "
        "result."
    )
    table = page.Table(rows, ("", "time", "share"), (1, 2))
    return page.Section("Goodput", [line], tables=[table], bar=bar)


def history_section(run: RecordedRun) -> page.Section | None:
    """The processes that worked on the run, and the updates that were skipped."""
    rows = []
    for start in run.record.get("starts", ()):
        devices = start.get("devices", {})
        rows.append(
            [
                page.Cell(when(start["began"])),
                page.Cell(when(start["ended"])),
                page.Cell(f"{start['first_step']} to {start['last_step']}"),
                page.Cell(meaning(start["exit_code"])),
                page.Cell(f"{devices.get('count')} x {devices.get('kind')}"),
                page.Cell(commit_of(start), code=True),
            ]
        )
    bad = run.bad_steps()
    lines = []
    if bad:
        shown = ", ".join(map(str, bad[:30])) + (", ..." if len(bad) > 30 else "")
        lines.append(f"{len(bad)} updates skipped or not finite, at the steps {shown}.")
    elif run.training:
        lines.append("No update was skipped at a logged step.")
    for event in run.events:
        if event["event"] == "rolled_back":
            lines.append(f"The run went back to the checkpoint of step {event['step']}.")
    if not rows and not lines:
        return None
    head = ("began", "ended", "steps", "how", "devices", "commit")
    return page.Section(
        "Processes and skipped updates", lines, tables=[page.Table(rows, head)] if rows else []
    )


def checkpoints_section(run: RecordedRun) -> page.Section | None:
    """Every checkpoint that was written, and whether it is still there."""
    folder = run.folder / "checkpoints"
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    known = run.record.get("checkpoints", {})
    steps = sorted({*known, *(name for name in there if name.isdecimal())}, key=int)
    if not steps:
        return None
    rows = [
        [
            page.Cell(step),
            page.Cell(f"{known[step]['files']:,}" if step in known else ""),
            page.Cell(f"{known[step]['bytes'] / 1e6:,.1f} MB" if step in known else ""),
            page.Cell("kept" if step in there else "deleted"),
            page.Cell(known[step]["sha256"][:16] if step in known else "", code=True),
        ]
        for step in steps
    ]
    head = ("step", "files", "size", "", "SHA-256 of names, sizes and indices")
    return page.Section("Checkpoints", tables=[page.Table(rows, head, (0, 1, 2))])


def config_section(run: RecordedRun) -> page.Section:
    """The config, the data and the software."""
    config = [[page.Cell(key, code=True), page.Cell(value)] for key, value in run.config.items()]
    tables = [page.Table(config, ("key", "value"), closed=f"config, {len(config)} keys")]
    data = [
        [page.Cell(name), page.Cell(path), page.Cell(digest[:16], code=True)]
        for each in run.record.get("data", ())
        for (name, path), (_, digest) in [each.items()]
    ]
    if data:
        tables.append(page.Table(data, ("", "path", "SHA-256"), closed="data"))
    for start in run.record.get("starts", ())[-1:]:
        software = {"grok": start["grok"], "python": start["python"], **start["packages"]}
        rows = [[page.Cell(name), page.Cell(version)] for name, version in software.items()]
        tables.append(page.Table(rows, ("package", "version"), closed="software of the last start"))
    return page.Section("What it is", tables=tables)


def status(run: RecordedRun) -> page.Status:
    """Whether the run is done, as far as its folder tells."""
    starts = run.record.get("starts", ())
    done = last_step(run)
    where = f"step {done:,} of {run.steps:,}" if run.steps else f"step {done:,}"
    if not starts:
        finished = run.steps and done >= run.steps
        return page.Status(f"finished, {where}" if finished else where, "muted")
    code = starts[-1]["exit_code"]
    if code is None:
        return page.Status(f"{where}; going on, or killed: no end is recorded", "muted")
    tone = "good" if code == DONE else "muted" if code == SAVED else "bad"
    return page.Status(f"{meaning(code)}, {where}", tone)


def facts(run: RecordedRun) -> list[str]:
    """What was trained, on what."""
    lines = []
    get = run.config.get
    if "model.num_layers" in run.config:
        lines.append(
            f"{get('model.num_layers')} layers, width {get('model.embed_dim')}, "
            f"{get('model.num_experts')} experts of which {get('model.num_selected_experts')} are "
            f"used; {get('data.batch_size')} rows of {get('data.sequence_length')} tokens a step"
        )
    for start in run.record.get("starts", ())[-1:]:
        axes = " x ".join(f"{axis} {size}" for axis, size in start["mesh"].items())
        devices = start["devices"]
        lines.append(
            f"{devices['count']} x {devices['kind']}, {devices['processes']} "
            f"process{'es' if devices['processes'] > 1 else ''}, mesh {axes}; grok "
            f"{start['grok']}, commit {commit_of(start)}"
        )
    return lines


def tiles(run: RecordedRun) -> list[page.Tile]:
    """The figures to read first."""
    found = []
    _, loss_P = run.series("loss")
    if len(loss_P):
        found.append(page.Tile("loss, last logged", f"{loss_P[-1]:.3f}"))
    for key, name in (
        ("validation_loss", "held-out loss"),
        ("validation_bits_per_byte", "held-out bits per byte"),
    ):
        _, values_P = run.series(key, "validation")
        if len(values_P):
            found.append(page.Tile(name, f"{values_P[-1]:.3f}"))
    if len(run.training) and np.isfinite(run.tokens()[-1]):
        found.append(page.Tile("tokens seen", short(run.tokens()[-1])))
    for key, name in (("tokens_per_second", "tokens per second"), ("mfu", "MFU")):
        _, values_P = run.series(key)
        if len(values_P):
            middle = float(np.median(values_P))
            found.append(page.Tile(name, f"{middle:.1%}" if key == "mfu" else f"{middle:,.0f}"))
    if run.goodput is not None and run.goodput.total:
        found.append(page.Tile("goodput", f"{run.goodput.share:.1%}"))
        found.append(page.Tile("wall time", duration(run.goodput.total)))
    return found


def last_step(run: RecordedRun) -> int:
    """The last step that is known of."""
    logged = [line["step"] for line in (*run.training, *run.validation)]
    told = [start["last_step"] or 0 for start in run.record.get("starts", ())]
    return max((*logged, *told), default=0)


def final(points: int) -> int:
    """How many of the last points are a run's end."""
    return max(1, round(FINAL_SHARE * points))


def meaning(code: int | None) -> str:
    """What an exit code says."""
    known = {None: "no end recorded", DONE: "finished", SAVED: "asked to stop, saved"}
    return known.get(code, f"ended with exit code {code}")


def commit_of(start: dict) -> str:
    """The commit that a process ran, and whether its files had been changed."""
    commit = start.get("commit")
    if commit is None:
        return "unknown"
    return commit[:12] + (" with changes" if start["dirty"] else "")


def when(time: str | None) -> str:
    """A time for people, to the minute, in UTC."""
    if time is None:
        return ""
    return datetime.datetime.fromisoformat(time).strftime("%Y-%m-%d %H:%M UTC")
