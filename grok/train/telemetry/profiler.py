"""Profiles of training steps, for XProf and TensorBoard: those of `train.profile`, and those that
`grok profile` asks for while a run goes on."""

import contextlib
import threading
from typing import Any

import jax

from grok.train.telemetry.event_log import EventLog
from grok.train.telemetry.profile_request import Request, answer_request, take_request
from grok.train.telemetry.run_manifest import RunDir

PROFILE_FOLDER = "profile"
POLL_SECONDS = 3.0  # between two looks for a request


class Profiler:
    """Profiles steps of one process into the folder `profile` of the run."""

    def __init__(
        self, run_dir: RunDir | None, folder: str, steps: tuple[int, ...], events: EventLog
    ):
        """`steps`: first and last, () for none; `folder`: the run's, where requests are. Without
        `run_dir` nothing is profiled."""
        self._run_dir, self._folder, self._events = run_dir, folder, events
        self._first, self._last = steps if steps and run_dir is not None else (0, 0)
        self._running = False
        self._asked: Request | None = None  # set by the thread, until its profile is written
        self._closed = threading.Event()

    def __enter__(self) -> "Profiler":
        if self._run_dir is not None:
            threading.Thread(target=self._poll, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._closed.set()
        self._stop()

    def _poll(self) -> None:
        # Beside the steps: at gs:// each look takes a while.
        while not self._closed.wait(POLL_SECONDS):
            if self._asked is None:
                self._asked = take_request(self._folder)

    def before(self, step: int) -> None:
        """Call it before `step` is dispatched."""
        if self._asked is not None and not self._running and step > self._last:
            self._first, self._last = step, step + self._asked.steps - 1
        # A run that resumes in the middle records the rest.
        if self._run_dir is not None and self._first <= step <= self._last and not self._running:
            with self._events.during("profile"):
                jax.profiler.start_trace(str(self._run_dir.path / PROFILE_FOLDER))
            self._running, self._first = True, step

    def after(self, step: int, metrics: dict[str, jax.Array]) -> bool:
        """Call it with the metrics of `step`; returns whether that ended the profile."""
        if not self._running or step < self._last:
            return False
        jax.block_until_ready(metrics)
        self._stop()
        return True

    def _stop(self) -> None:
        """Ends the profile, if one is being recorded, and answers who asked for it."""
        if not self._running or self._run_dir is None:
            return
        self._running = False
        with self._events.during("profile"):
            jax.profiler.stop_trace()
        if (request := self._asked) is not None:
            self._asked = None
            # A disk that is full ends no run for a profile; who asked sees that none comes.
            with contextlib.suppress(OSError):
                self._run_dir.upload()
                answer_request(self._folder, request, self._first, self._last)
