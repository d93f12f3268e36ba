"""Cache of what is computed once an epoch, filled for the next epoch in the background."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

# The current epoch, the one before, whose end may be in the same batch, and the next.
MAX_EPOCHS = 3


class EpochCache[Value]:
    """Values of `compute` by epoch, each computed once; safe to use from several threads."""

    def __init__(self, compute: Callable[[int], Value]) -> None:
        self._compute = compute
        self._values: dict[int, Future[Value]] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, "epoch")

    def get(self, epoch: int, progress: float) -> Value:
        """The value of `epoch`, of which a share of `progress` is over; from the middle on, the
        next epoch's is computed in the background."""
        with self._lock:
            value = self._start(epoch)
            if progress >= 0.5:
                self._start(epoch + 1)
        return value.result()

    def _start(self, epoch: int) -> Future[Value]:
        value = self._values.pop(epoch, None) or self._pool.submit(self._compute, epoch)
        self._values[epoch] = value
        if len(self._values) > MAX_EPOCHS:
            del self._values[next(iter(self._values))]
        return value
