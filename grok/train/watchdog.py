"""The watchdog: ends a run that hangs, after printing where, so that it can be started again."""

import faulthandler
import sys
import threading
import time
from pathlib import Path

from grok import distributed
from grok.errors import RESTART
from grok.storage import is_remote


class Watchdog:
    """Ends the process with RESTART when no heartbeat comes for `seconds` (0: never). It is paused
    until the first, and from `pause` to the next, since compilation takes its time. The stacks of
    all threads go to stderr and, if the folder is local, to `stacks-PROCESS.txt`."""

    def __init__(self, seconds: int, folder: str):
        self._seconds, self._folder = seconds, folder
        self._step, self._last_heartbeat = 0, float("inf")
        self._stopped = threading.Event()

    def heartbeat(self, step: int) -> None:
        """Reports that `step` is done."""
        self._step, self._last_heartbeat = step, time.monotonic()

    def pause(self) -> None:
        """Stops watching until the next heartbeat."""
        self._last_heartbeat = float("inf")

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1, self._seconds / 4)):
            if time.monotonic() - self._last_heartbeat > self._seconds:
                self._abort()

    def _abort(self) -> None:
        faulthandler.dump_traceback(sys.stderr)
        if not is_remote(self._folder):
            stacks = Path(self._folder) / f"stacks-{distributed.process_index()}.txt"
            with stacks.open("w") as file:
                faulthandler.dump_traceback(file)
        distributed.abort(
            RESTART,
            f"no step was finished for {self._seconds} s (train.hang_timeout_seconds) after step "
            f"{self._step}; the stacks of all threads are above.",
        )
