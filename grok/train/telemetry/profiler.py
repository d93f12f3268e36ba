"""A profile of some steps of a run, in the format that XProf and TensorBoard read."""

from pathlib import Path

import jax

from grok.train.telemetry.event_log import EventLog


class Profiler:
    """Records the steps that `train.profile` names into a folder: host, device, and every
    operation by its scope."""

    def __init__(self, folder: Path | None, steps: tuple[int, ...], events: EventLog):
        """`steps`: the first and the last; empty for none, as where there is no folder. What it
        costs to start and to write a profile is told to `events`."""
        self._folder, self._events = folder, events
        self._first, self._last = steps if steps and folder is not None else (0, 0)
        self._running = False

    def before(self, step: int) -> None:
        """To be called before `step` is dispatched."""
        # A run that was resumed in the middle records what is left.
        if self._first <= step <= self._last and not self._running:
            with self._events.during("profile"):
                jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, metrics: dict[str, jax.Array]) -> bool:
        """To be called with what `step` returned; whether the profile was finished by it."""
        if not self._running or step < self._last:
            return False
        jax.block_until_ready(metrics)
        self.close()
        return True

    def close(self) -> None:
        """Ends a profile that is still being recorded."""
        if self._running:
            with self._events.during("profile"):
                jax.profiler.stop_trace()
            self._running = False
