"""The watchdog: ends a run that hangs, after printing where, so that it can be started again."""

import contextlib
import faulthandler
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from grok import distributed
from grok.config.train import TrainConfig
from grok.errors import RESTART
from grok.storage import is_remote


class _Limit(NamedTuple):
    """The end of the present wait (seconds of the monotonic clock), and the reason to give then."""

    until: float
    sentence: str


class Watchdog:
    """Ends all processes with RESTART when no step begins within train.start_timeout_seconds, and
    from then on when none ends for train.hang_timeout_seconds (0: never). The stacks of all threads
    go to stderr and, if the folder is local, to `stacks-PROCESS.txt`."""

    def __init__(self, config: TrainConfig, folder: str):
        self._config, self._folder = config, folder
        self._stopped = threading.Event()
        self.starting("the first step")

    def starting(self, goal: str) -> None:
        """Reports that a start or restart begins: all that comes before `goal`."""
        seconds = self._config.start_timeout_seconds
        key = "train.start_timeout_seconds"
        self._limit = _limit(seconds, f"{goal} did not begin within {seconds} s ({key})")

    def heartbeat(self, step: int) -> None:
        """Reports that `step` is done."""
        seconds = self._config.hang_timeout_seconds
        problem = f"no step was finished for {seconds} s (train.hang_timeout_seconds)"
        self._limit = _limit(seconds, f"{problem} after step {step}")

    def rest(self) -> None:
        """Stops watching: the steps are done."""
        self._limit = _limit(0, "")

    def __enter__(self) -> "Watchdog":
        shortest = min(self._config.start_timeout_seconds, self._config.hang_timeout_seconds)
        period = min(1, shortest / 4) or 1
        threading.Thread(target=self._watch, args=[period], daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    def _watch(self, period: float) -> None:
        while not self._stopped.wait(period):
            limit = self._limit
            if time.monotonic() > limit.until:
                self._abort(limit.sentence)

    def _abort(self, sentence: str) -> None:
        faulthandler.dump_traceback(sys.stderr)
        if not is_remote(self._folder):
            stacks = Path(self._folder) / f"stacks-{distributed.process_index()}.txt"
            # A disk that is full or gone must not keep the run from ending.
            with contextlib.suppress(OSError):
                stacks.parent.mkdir(parents=True, exist_ok=True)
                with stacks.open("w") as file:
                    faulthandler.dump_traceback(file)
        distributed.abort(RESTART, f"{sentence}; the stacks of all threads are above.")


def _limit(seconds: int, sentence: str) -> _Limit:
    return _Limit(time.monotonic() + seconds if seconds else float("inf"), sentence)
