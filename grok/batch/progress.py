"""What a job shows to people: a progress bar on a terminal, plain lines elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from grok.train.telemetry.progress import duration

# Between two lines where no one watches.
SECONDS = 10


class Display:
    """Requests done, tokens a second in and out, and the time left."""

    def __init__(self, requests: int, done: int, quiet: bool = False) -> None:
        """Of a job, or a process's share of it, that has `requests`, `done` of them before."""
        self._console = Console(quiet=quiet)
        self._watched = self._console.is_terminal
        self._requests = requests
        # Requests, tokens and time since when the pace is taken: the first steps are compiled.
        self._since: tuple[int, int, int, float] | None = None
        self._progress = Progress(
            TextColumn("requests"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=quiet or not self._watched,
        )
        self._task = self._progress.add_task("", total=requests, completed=done, note="compiling")
        self._said = time.monotonic()

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, done: int, tokens_in: int, tokens_out: int) -> None:
        """Shows how many requests are done, and tokens since the start of this process."""
        now = time.monotonic()
        note = self._pace(done, tokens_in, tokens_out, now)
        self._progress.update(self._task, completed=done, note=note)
        if not self._watched and now - self._said >= SECONDS:
            self._said = now
            say(f"requests {done:,}/{self._requests:,}  {note}", self._console)

    def _pace(self, done: int, tokens_in: int, tokens_out: int, now: float) -> str:
        if self._since is None:
            if tokens_out:
                self._since = done, tokens_in, tokens_out, now
            return "compiling"
        first, before_in, before_out, began = self._since
        seconds = max(now - began, 1e-9)
        note = (
            f"{(tokens_in - before_in) / seconds:,.0f} tokens/s in  "
            f"{(tokens_out - before_out) / seconds:,.0f} tokens/s out"
        )
        if done == first:
            return note
        return f"{note}  {duration((self._requests - done) * seconds / (done - first))} left"


def say(text: str, console: Console | None = None) -> None:
    """Prints a line, as it is and as long as it is."""
    console = console or Console()
    console.print(text, highlight=False, markup=False, soft_wrap=True)
