"""SIGINT and SIGTERM: all hosts of a run stop after the same step, and agree on when to save."""

import functools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grok import distributed
from grok.config import MESH_AXES


class PreemptionSignal:
    """Catches SIGINT and SIGTERM: the first asks the run to save and exit, the second ends it. A
    signal may reach one host only, and saving is a collective. So before each step every host
    dispatches a tiny all-reduce of "was I asked to stop" and "am I still saving" (`exchange`), and
    reads the result after dispatching the step: no host waits, and all read the same."""

    def __init__(self, mesh: Mesh) -> None:
        self._requested = self._saving = False
        self._flags_sharding = NamedSharding(mesh, PartitionSpec(MESH_AXES, None))
        # [stop, saving] of each device -> of any
        reduce = functools.partial(jnp.max, axis=0)
        self._any = jax.jit(reduce, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._result: jax.Array | None = None

    def exchange(self, saving: bool = False) -> None:
        """Shares with all hosts, before a step, whether this one was asked to stop and whether it
        is `saving`."""
        self._saving = saving
        if distributed.process_count() > 1:
            flags = np.asarray([[self._requested, saving]], np.int32)
            shape = (self._flags_sharding.mesh.size, 2)
            array = jax.make_array_from_callback(shape, self._flags_sharding, lambda _: flags)
            self._result = self._any(array)

    def should_stop(self) -> bool:
        """True if any host had been asked to stop at the last exchange; the same on all hosts."""
        return self._requested if self._result is None else bool(np.asarray(self._result)[0])

    def is_any_saving(self) -> bool:
        """True if any host was saving at the last exchange; the same on all hosts."""
        return self._saving if self._result is None else bool(np.asarray(self._result)[1])

    def __enter__(self) -> "PreemptionSignal":
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._handlers = {number: signal.signal(number, self._on_signal) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        self._requested = True
        for caught in self._handlers:
            signal.signal(caught, signal.SIG_DFL)
        # Straight to the descriptor: the signal may have come in the middle of a print.
        os.write(2, b"\nstopping soon; once more stops at once, without saving\n")
