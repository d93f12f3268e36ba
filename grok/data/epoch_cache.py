"""Plans of epochs, kept while they are needed, the next one made before it is."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

# The one that goes on, the one before, whose end is in the same batch, and the next.
KEPT = 3


class EpochCache[Plan]:
    """What `make` gives for an epoch, made once; threads may ask at once."""

    def __init__(self, make: Callable[[int], Plan]) -> None:
        self._make = make
        self._plans: dict[int, Future[Plan]] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, "epoch")

    def at(self, epoch: int, share: float) -> Plan:
        """The plan of `epoch`, of which `share` is over; past the middle the next is begun."""
        with self._lock:
            wanted = self._begin(epoch)
            if share >= 0.5:
                self._begin(epoch + 1)
        return wanted.result()

    def _begin(self, epoch: int) -> Future[Plan]:
        plan = self._plans.pop(epoch, None) or self._pool.submit(self._make, epoch)
        self._plans[epoch] = plan
        if len(self._plans) > KEPT:
            del self._plans[next(iter(self._plans))]
        return plan
