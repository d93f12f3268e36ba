"""The watchdog of a server: ends one that hangs, so that it can be started again."""

import faulthandler
import sys
import threading
import time
from collections.abc import Callable

from grok import distributed
from grok.config.infer import ServeConfig
from grok.errors import RESTART

PERIOD_SECONDS = 1.0


class Watchdog:
    """Ends all processes with RESTART when the engine is not ready within start_timeout_seconds,
    and from then on when one of its steps takes hang_timeout_seconds (0: never). The stacks of all
    threads go to stderr."""

    def __init__(self, config: ServeConfig):
        self._began = time.monotonic()
        self._step_began: Callable[[], float | None] | None = None
        self._start, self._hang = config.start_timeout_seconds, config.hang_timeout_seconds
        self._stopped = threading.Event()

    def ready(self, step_began: Callable[[], float | None]) -> None:
        """Reports that the start is over; `step_began` returns when the present step began, in
        seconds of the monotonic clock, or None between steps."""
        self._step_began = step_began

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        shortest = min(filter(None, (self._start, self._hang)), default=PERIOD_SECONDS)
        while not self._stopped.wait(min(PERIOD_SECONDS, shortest / 4)):
            if problem := self.problem():
                faulthandler.dump_traceback(sys.stderr)
                distributed.abort(RESTART, f"{problem}; the stacks of all threads are above.")

    def problem(self) -> str | None:
        """The clause that says what takes too long by now, or None."""
        now = time.monotonic()
        if self._step_began is None:
            if self._start and now - self._began > self._start:
                return f"the engine was not ready within {self._start} s (start_timeout_seconds)"
        elif (began := self._step_began()) and self._hang and now - began > self._hang:
            return f"a step took more than {self._hang} s (hang_timeout_seconds)"
        return None
