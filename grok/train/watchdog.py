"""Notices that a run hangs, says where, and ends it so that it can be started again."""

import faulthandler
import sys
import threading
import time
from pathlib import Path

from grok import distributed
from grok.errors import RESTART
from grok.storage import is_remote


class Watchdog:
    """Ends the process with RESTART when there is no sign of life for `seconds` (0: never).

    It looks away until the first sign, and after `pause` until the next: what compiles takes as
    long as it takes. Before the end, the stacks of all threads go to stderr and, where the run's
    folder is on this machine, to `stacks-PROCESS.txt` in it.
    """

    def __init__(self, seconds: int, folder: str):
        self._seconds, self._folder = seconds, folder
        self._step, self._last = 0, float("inf")
        self._over = threading.Event()

    def heartbeat(self, step: int) -> None:
        """A sign of life: `step` is done, or something that belongs to it."""
        self._step, self._last = step, time.monotonic()

    def pause(self) -> None:
        """Looks away until the next sign of life."""
        self._last = float("inf")

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(min(1, self._seconds / 4)):
            if time.monotonic() - self._last > self._seconds:
                self._abort()

    def _abort(self) -> None:
        faulthandler.dump_traceback(sys.stderr)
        if not is_remote(self._folder):
            with (Path(self._folder) / f"stacks-{distributed.process_index()}.txt").open(
                "w"
            ) as file:
                faulthandler.dump_traceback(file)
        distributed.abort(
            RESTART,
            f"no step was finished for {self._seconds} s (train.hang_timeout_seconds) after step "
            f"{self._step}; the stacks of all threads are above.",
        )
