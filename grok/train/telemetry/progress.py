"""What a run shows to people: a progress bar on a terminal, plain lines elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

# Share of the smoothed loss that stays from one report to the next.
SMOOTHING = 0.9


class TrainProgress:
    """Step, loss, smoothed loss, tokens a second, MFU, time left, and the save that is going on."""

    def __init__(self, steps: int, first: int, quiet: bool = False):
        """Of a run of `steps`, of which `first` are done; a `quiet` one shows nothing."""
        self._steps = steps
        self._console = Console(quiet=quiet)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=steps, completed=first, note="starting")
        self._began: tuple[int, float] | None = None
        self._loss_sum = self._weight = 0.0
        self._note = ""

    def __enter__(self) -> "TrainProgress":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, step: int, saving: int | None) -> None:
        """Moves the bar to `step`; `saving`: the step whose checkpoint is being written."""
        note = self._note if saving is None else f"{self._note}  saving step {saving}"
        self._progress.update(self._task, completed=step, note=note)
        if self._began is None:
            # From here on, since the first step is compiled.
            self._began = step, time.monotonic()

    def report(
        self, step: int, loss: float, tokens_per_second: float | None, mfu: float | None
    ) -> None:
        """Shows the figures of a step."""
        parts = [f"loss {loss:.3f}", f"smoothed {self._smoothed(loss):.3f}"]
        if tokens_per_second is not None:
            parts.append(f"{tokens_per_second:,.0f} tokens/s")
        if mfu is not None:
            parts.append(f"MFU {mfu:.1%}")
        left = self._seconds_left(step)
        if left is not None:
            parts.append(f"{duration(left)} left")
        self._note = "  ".join(parts)
        self._progress.update(self._task, note=self._note)
        if not self._console.is_terminal:
            self.log(f"step {step}  {self._note}")

    def log(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _smoothed(self, loss: float) -> float:
        """Exponential mean of the losses so far; one that is not finite is left out."""
        if abs(loss) < float("inf"):
            self._loss_sum = SMOOTHING * self._loss_sum + (1 - SMOOTHING) * loss
            self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        return self._loss_sum / self._weight if self._weight else loss

    def _seconds_left(self, step: int) -> float | None:
        """At the pace since the first step, with whatever came between steps."""
        if self._began is None or step == self._steps or step == self._began[0]:
            return None
        first, began = self._began
        return (self._steps - step) * (time.monotonic() - began) / (step - first)


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
