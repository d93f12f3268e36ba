"""A profile of some steps of a run, in the format of XProf and TensorBoard."""

from pathlib import Path

import jax

from grok.train.telemetry.event_log import EventLog


class Profiler:
    """Records the steps that `train.profile` names into a folder: host, device, and every
    operation by its scope."""

    def __init__(self, folder: Path | None, steps: tuple[int, ...], events: EventLog):
        """`steps`: the first and the last; () for none. Without a folder nothing is profiled. The
        time to start and to write a profile is an event of its own."""
        self._folder, self._events = folder, events
        self._first, self._last = steps if steps and folder is not None else (0, 0)
        self._running = False

    def before(self, step: int) -> None:
        """Call it before `step` is dispatched."""
        # A run that resumes in the middle records the rest.
        if self._first <= step <= self._last and not self._running:
            with self._events.during("profile"):
                jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, metrics: dict[str, jax.Array]) -> bool:
        """Call it with the metrics of `step`; returns whether that ended the profile."""
        if not self._running or step < self._last:
            return False
        jax.block_until_ready(metrics)
        self.close()
        return True

    def close(self) -> None:
        """Ends the profile, if one is being recorded."""
        if self._running:
            with self._events.during("profile"):
                jax.profiler.stop_trace()
            self._running = False
