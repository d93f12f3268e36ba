"""The progress display of all commands: a bar on a terminal, plain lines elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from grok.terminal import wrap

LINE_SECONDS = 10  # between two lines where there is no terminal
BAR_SECONDS = 0.1  # between two updates of a bar


class ProgressDisplay:
    """Work done out of a total, its figures, and the time left. `label` is a format of `done`,
    `total` (None: not known) and `share`. The pace is taken since the first update, without
    compilation. A `transient` bar is gone at its end; a `quiet` display shows nothing."""

    def __init__(
        self,
        label: str,
        total: float | None = None,
        done: float = 0,
        *,
        note: str = "",
        line_seconds: float = LINE_SECONDS,
        transient: bool = False,
        quiet: bool = False,
        stderr: bool = False,
    ) -> None:
        self.total, self.done = total, done
        self._label, self._line_seconds = label, line_seconds
        self._console = Console(quiet=quiet, stderr=stderr)
        self.is_terminal = self._console.is_terminal
        self._bar = Progress(
            TextColumn("{task.fields[label]}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
            disable=quiet or not self.is_terminal,
            transient=transient,
        )
        self._task = self._bar.add_task("", label=self._count(), note=note)
        self._starts: dict[str, tuple[float, float]] = {}
        self._shown = time.monotonic()

    def __enter__(self) -> Self:
        self._move()
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    @property
    def due(self) -> bool:
        """True where the last update was shown long enough ago."""
        seconds = BAR_SECONDS if self.is_terminal else self._line_seconds
        return time.monotonic() - self._shown >= seconds

    def rate(self, name: str, amount: float) -> float:
        """Growth per second of the amount called `name` since the first call with this name."""
        now = time.monotonic()
        first, began = self._starts.setdefault(name, (amount, now))
        return (amount - first) / max(now - began, 1e-9)

    def update(self, done: float, *figures: str) -> str:
        """Shows `done` and figures; returns the text that stands behind the bar."""
        self.done = done
        line_due = "done" in self._starts and not self.is_terminal and self.due
        rate = self.rate("done", done)
        if rate and self.total and done < self.total:
            figures = (*figures, f"{duration((self.total - done) / rate)} left")
        note = "  ".join(figures)
        self._move(note=note)
        if line_due or self.is_terminal:
            self._shown = time.monotonic()
        if line_due:
            self.log(f"{self._count()}  {note}")
        return note

    def log(self, text: str) -> None:
        """Prints a line, above the bar where there is one; on a terminal wrapped by words."""
        text = wrap(text, self._console.width) if self.is_terminal else text
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _move(self, **fields: Any) -> None:
        fields |= {"completed": self.done, "total": self.total, "label": self._count()}
        self._bar.update(self._task, **fields)

    def _count(self) -> str:
        share = self.done / self.total if self.total else 0.0
        return self._label.format(done=self.done, total=self.total or 0, share=share)


@contextlib.contextmanager
def byte_progress(quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Gives a function to call with a file or tensor, the bytes done by now, and all bytes; shows
    their share, the rate and the time left, unless `quiet`."""
    with contextlib.ExitStack() as stack:
        displays: list[ProgressDisplay] = []  # none before there is something to show

        def on_progress(name: str, done: int, total: int) -> None:
            if not displays:
                display = ProgressDisplay(
                    "{share:4.0%} of {total:,} bytes", total, quiet=quiet, stderr=True
                )
                displays.append(stack.enter_context(display))
                if done:
                    display.log(f"{done:,} of {total:,} bytes are there from an earlier try")
            (display,) = displays
            display.update(done, f"{display.rate('bytes', done) / 1e6:,.0f} MB/s", name)

        yield on_progress


@contextlib.contextmanager
def phase_progress(title: str) -> Iterator[Callable[[str], None]]:
    """Gives a function to call with the name of each phase as it begins."""
    with ProgressDisplay(title, line_seconds=0, transient=True, stderr=True) as display:
        display.update(0, "starting")

        def on_phase(phase: str) -> None:
            display.update(0, phase)

        yield on_phase


def duration(seconds: float) -> str:
    """`50 s`, `12 min`, `3 h 20 min`, `5 d 3 h`."""
    minutes, hours, days = round(seconds / 60), round(seconds // 3600), round(seconds // 86400)
    if seconds < 99:
        return f"{seconds:.0f} s"
    if minutes < 99:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{days} d {hours % 24} h"
