"""What a run reports: lines of JSON for programs, a progress bar for people."""

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class MetricsFile:
    """`metrics.jsonl` of a run: one JSON object a line, each with the `step` it belongs to."""

    def __init__(self, path: Path, first_step: int):
        """Of the file at `path`; once entered, it appends what follows step `first_step`.

        Lines of later steps, done before a crash and about to be done again, are dropped then.
        """
        self._path, self._first_step = path, first_step

    def __enter__(self) -> "MetricsFile":
        if self._path.exists():
            kept = [line for line in read_metrics(self._path) if line["step"] <= self._first_step]
            self._path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = self._path.open("a", buffering=1)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, step: int, **values: Any) -> None:
        """Appends one line; it is in the file when this returns."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line that a crash cut short is left out."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


class Display:
    """A progress bar with loss, tokens a second and time left; plain lines where no one watches."""

    def __init__(self, steps: int, done: int):
        self._console = Console()
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=steps, completed=done, note="compiling")

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, step: int) -> None:
        """Moves the bar to `step`."""
        self._progress.update(self._task, completed=step)

    def report(self, step: int, loss: float, tokens_per_second: float | None) -> None:
        """Shows the figures of a step."""
        note = f"loss {loss:.3f}"
        if tokens_per_second is not None:
            note += f"  {tokens_per_second:,.0f} tokens/s"
        self._progress.update(self._task, note=note)
        if not self._console.is_terminal:
            self.say(f"step {step}  {note}")

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, highlight=False, soft_wrap=True)


class Speed:
    """Tokens a second since the last start, compilation, validation and saves left out."""

    def __init__(self, tokens_per_step: int):
        self._tokens_per_step = tokens_per_step
        self._step, self._time = 0, time.monotonic()

    def start(self, step: int) -> None:
        """Measures from `step`, just done, onwards."""
        self._step, self._time = step, time.monotonic()

    def at(self, step: int) -> float | None:
        """Tokens a second up to `step`, and from there on anew; None when nothing was measured."""
        steps, seconds = step - self._step, time.monotonic() - self._time
        self.start(step)
        return steps * self._tokens_per_step / seconds if steps else None
