"""SIGINT and SIGTERM: all hosts of a run stop after the same step."""

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
    dispatches a tiny all-reduce of "was I asked to stop" (`exchange`), and reads the result after
    dispatching the step (`should_stop`): no host waits, and all read the same."""

    def __init__(self, mesh: Mesh) -> None:
        self._requested = False
        self._flags_sharding = NamedSharding(mesh, PartitionSpec(MESH_AXES))
        self._any = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._result: jax.Array | None = None

    def exchange(self) -> None:
        """Shares with all hosts, before a step, whether this one was asked to stop."""
        if distributed.process_count() > 1:
            flag = np.asarray([self._requested], np.int32)
            shape = (self._flags_sharding.mesh.size,)
            flags = jax.make_array_from_callback(shape, self._flags_sharding, lambda _: flag)
            self._result = self._any(flags)

    def should_stop(self) -> bool:
        """True if any host had been asked to stop at the last exchange; the same on all hosts."""
        return self._requested if self._result is None else bool(self._result)

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
