"""`events.jsonl`: the log of how a run spent its time, a JSON object a line with `time` (its start,
seconds since 1970), `event` and, for a span of `during`, `seconds`, without the spans inside it.

Spans: start, restore, compile, validate, sdc_check, save, profile. Others: `began`, a process
started to work on the run; `resumed`, it continues after `step` steps, 0 at the very beginning;
`steps`, training steps `first` + 1 to `last`, without spans; `data`, seconds that the loop waited
for batches since the line before; `rolled_back`, to an earlier `step`, within one process; `ended`,
the process exited by itself after `step`, with exit `code`. Lines are appended, each by one write,
so a kill costs at most the line being written. `measure_goodput` adds them up."""

import contextlib
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

LAP_SECONDS = 30  # longest time between two lines of steps
# Events that set the step from which the run continues; steps beyond it are repeated.
REWINDS = ("resumed", "rolled_back")
SPANS = ("start", "restore", "compile", "data", "validate", "sdc_check", "save", "profile")
KINDS = ("useful", "lost", *SPANS, "down", "other")


class EventLog(contextlib.AbstractContextManager):
    """Writes the log. Without a path (all processes but the primary) nothing is written."""

    def __init__(self, path: Path | None, began: float | None = None):
        """Appends to `path` that a process `began` (default: now), with its start until now."""
        path = path or Path(os.devnull)
        is_cut_short = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        self._file = path.open("ab", buffering=0)
        if is_cut_short:
            self._file.write(b"\n")
        self._nested = [0.0]  # seconds of the spans that ended within each open span; first: none
        self._waited = 0.0
        now = time.time()
        self._write(now if began is None else began, "began", {})
        if began is not None:
            self._write(began, "start", {"seconds": round(now - began, 6)})
        self.steps_from(0)

    def clock(self) -> float:
        """Seconds from an arbitrary start, stopped during spans: the time of steps."""
        return time.monotonic() - self._nested[0]

    def note(self, event: str, **facts: Any) -> None:
        """Writes the line of an event that takes no time."""
        self._write(time.time(), event, facts)

    @contextlib.contextmanager
    def during(self, event: str, **facts: Any) -> Iterator[None]:
        """Times a span; its line is written when it ends."""
        began = time.time()
        with self._timed() as seconds:
            yield
        self._write(began, event, {**facts, "seconds": round(seconds[0], 6)})

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Times a wait for data; the sum of waits is written with the next line of steps."""
        with self._timed() as seconds:
            yield
        self._waited += seconds[0]

    def steps_from(self, step: int) -> None:
        """Starts to count steps, of which `step` are done."""
        self._lap_step, self._lap_time, self._lap_clock = step, time.time(), self.clock()
        self._waited = 0.0

    def steps_to(self, step: int, at_once: bool = True) -> None:
        """Writes the steps since the last line of them: `at_once`, or LAP_SECONDS after it."""
        is_due = at_once or time.time() - self._lap_time >= LAP_SECONDS
        if step == self._lap_step or not is_due:
            return
        seconds = round(self.clock() - self._lap_clock, 6)
        steps = {"first": self._lap_step, "last": step, "seconds": seconds}
        self._write(self._lap_time, "steps", steps)
        self._write(self._lap_time, "data", {"seconds": round(self._waited, 6)})
        self.steps_from(step)

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @contextlib.contextmanager
    def _timed(self) -> Iterator[list[float]]:
        """Yields a list that holds, at the end, the seconds without the spans inside this one."""
        began, result = time.monotonic(), [0.0]
        self._nested.append(0.0)
        try:
            yield result
        finally:
            total = time.monotonic() - began
            result[0] = total - self._nested.pop()
            self._nested[-1] += total

    def _write(self, began: float, event: str, facts: dict[str, Any]) -> None:
        line = {"time": round(began, 3), "event": event, **facts}
        self._file.write(json.dumps(line).encode() + b"\n")


def read_events(path: Path) -> list[dict[str, Any]]:
    """The lines of an `events.jsonl`, in order, without those that a crash cut short."""
    lines = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and {"time", "event"} <= line.keys()]


@dataclasses.dataclass(frozen=True)
class Goodput:
    """Wall time by kind, in the order of `KINDS`: of all processes that worked on the run, and of
    the gaps between them, except after one that had finished it. useful: steps; lost: steps not
    saved, so repeated; the spans; down: from the end of one that died to the next; other: rest."""

    seconds: dict[str, float]

    @property
    def total(self) -> float:
        """Wall time, seconds."""
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """Goodput, 0 to 1; 0 where no time has passed."""
        return self.seconds["useful"] / self.total if self.total else 0.0


def measure_goodput(events: Sequence[dict[str, Any]]) -> Goodput:
    """Adds up the lines of a run's `events.jsonl`."""
    seconds = dict.fromkeys(KINDS, 0.0)
    processes = _processes(events)
    for line in events:
        if line["event"] in SPANS:
            seconds[line["event"]] += line["seconds"]
    # Backwards: whether a step counts depends on what came after it.
    rewound_to: float = float("inf")
    for line in reversed(events):
        if line["event"] in REWINDS:
            rewound_to = min(rewound_to, line["step"])
        elif line["event"] == "steps":
            first, last = line["first"], line["last"]
            share = min(1.0, max(0.0, (rewound_to - first) / (last - first)))
            seconds["useful"] += share * line["seconds"]
            seconds["lost"] += (1 - share) * line["seconds"]
    for lines in processes:
        spent = sum(line["seconds"] for line in lines if "seconds" in line)
        seconds["other"] += max(0.0, _end(lines) - lines[0]["time"] - spent)
    for before, after in itertools.pairwise(processes):
        if before[-1]["event"] != "ended" or before[-1]["code"] != 0:
            seconds["down"] += max(0.0, after[0]["time"] - _end(before))
    return Goodput(seconds)


def _processes(events: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    processes: list[list[dict[str, Any]]] = []
    for line in events:
        if line["event"] == "began" or not processes:
            processes.append([])
        processes[-1].append(line)
    return processes


def _end(lines: Sequence[dict[str, Any]]) -> float:
    """The time of a process's last sign of life."""
    return max(line["time"] + line.get("seconds", 0.0) for line in lines)
