"""How a run is asked to stop, and how all its hosts stop after the same step."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grok import distributed
from grok.config import MESH_AXES


class StopRequest:
    """Notices SIGINT and SIGTERM: the first asks the run to save and leave, the second ends the
    process at once.

    A signal may reach one host alone, and saving is work for all of them. So before each step
    every host votes, in a tiny program of its own that the devices run in the order of the steps,
    and reads the outcome when the step has been handed to the devices: nobody waits, and all read
    the same.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._requested = False
        self._votes = NamedSharding(mesh, PartitionSpec(MESH_AXES))
        whole = NamedSharding(mesh, PartitionSpec())
        self._count = jax.jit(jnp.max, out_shardings=whole)
        self._outcome: jax.Array | None = None

    def vote(self) -> None:
        """Says, before a step, whether this host was asked to stop."""
        if distributed.count() > 1:
            mine = np.asarray([self._requested], np.int32)
            shape = (self._votes.mesh.size,)
            votes = jax.make_array_from_callback(shape, self._votes, lambda _: mine)
            self._outcome = self._count(votes)

    def agreed(self) -> bool:
        """Whether, at the last vote, any host had been asked; every host gets the same answer."""
        return self._requested if self._outcome is None else bool(self._outcome)

    def __enter__(self) -> "StopRequest":
        self._before = {
            number: signal.signal(number, self._notice)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame: object) -> None:
        self._requested = True
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        # Straight to the descriptor: the signal may have come in the middle of a print.
        os.write(2, b"\nstopping soon; once more stops at once, without saving\n")
