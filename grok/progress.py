"""How far a command is, in bytes: a bar on a terminal, and a line now and then elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator

import click

# Between two lines where no one watches.
SECONDS = 10


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Gives a function to call with what is being done, the bytes done, and all bytes.

    What is done at its first call is of an earlier try, and no part of the rate.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    name_column = TextColumn("{task.description}", markup=False)
    watched = console.is_terminal
    with Progress(*columns, name_column, console=console, disable=not watched) as bar:
        began = said = time.monotonic()
        before: int | None = None

        def tell(name: str, done: int, total: int) -> None:
            nonlocal said, before
            if before is None:
                before = done
                if done:
                    console.print(f"{done:,} of {total:,} bytes are there from an earlier try")
                bar.add_task("", total=total, completed=done)
            bar.update(bar.task_ids[0], description=name, completed=done)
            now = time.monotonic()
            if not watched and now - said >= SECONDS:
                said = now
                rate = max(1.0, (done - before) / (now - began))
                click.echo(
                    f"{done / total:4.0%} of {total:,} bytes, {rate / 1e6:,.0f} MB/s, "
                    f"{(total - done) / rate:,.0f} s left: {name}",
                    err=True,
                )

        yield tell


@contextlib.contextmanager
def phases(title: str) -> Iterator[Callable[[str], None]]:
    """Gives a function to call with what begins now: a line with the time on a terminal, and a
    line for each elsewhere."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True
    ) as bar:
        task = bar.add_task(f"{title}: starting", total=None)

        def tell(phase: str) -> None:
            bar.update(task, description=f"{title}: {phase}")
            if not console.is_terminal:
                click.echo(f"{title}: {phase}", err=True)

        yield tell
