"""`events.jsonl`: the log of how a run spent its time, one JSON object a line.

Each line has `time` (its start, seconds since 1970), `event` and, for a span, `seconds`, without
the spans inside it. Events that others read:

  began     a process started to work on the run
  resumed   it continues after `step` steps, 0 at the very beginning
  start, restore, compile, validate, save, profile
            spans of `during`
  steps     training steps `first` + 1 to `last`, without spans
  data      seconds that the loop waited for batches since the line before
  rolled_back
            the run was rolled back to an earlier `step`, within one process
  ended     the process exited by itself after `step`, with exit `code`

Lines are appended, each by one write, so a kill costs at most the line being written.
`grok.train.telemetry.goodput` adds them up.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Longest time between two lines of steps.
LAP_SECONDS = 30


class EventLog:
    """Writes the log. Without a path (all processes but the primary) nothing is written."""

    def __init__(self, path: Path | None, began: float | None = None):
        """Opens `path` to append to it, and records that a process `began` (default: now), with the
        time since then as its start."""
        self._file = None
        if path is not None:
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
        """Writes the steps since the last line of them, up to `step`; unless `at_once`, only when
        that line is LAP_SECONDS old."""
        is_due = at_once or time.time() - self._lap_time >= LAP_SECONDS
        if step == self._lap_step or not is_due:
            return
        seconds = round(self.clock() - self._lap_clock, 6)
        self._write(
            self._lap_time, "steps", {"first": self._lap_step, "last": step, "seconds": seconds}
        )
        self._write(self._lap_time, "data", {"seconds": round(self._waited, 6)})
        self.steps_from(step)

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
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
        if self._file is not None:
            line = {"time": round(began, 3), "event": event, **facts}
            self._file.write(json.dumps(line).encode() + b"\n")


def read_events(path: Path) -> list[dict[str, Any]]:
    """The lines of an `events.jsonl`, in order, without those that a crash cut short."""
    lines = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and {"time", "event"} <= line.keys()]
