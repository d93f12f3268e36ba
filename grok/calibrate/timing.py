"""Time of one iteration of a loop on the devices, so that nothing of it can be dropped.

Every iteration works on the result of the one before it, and the number of iterations is an
argument of the program: a compiler can neither leave one out nor do two at once.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grok import distributed

Clock = Callable[[], float]

MIN_SECONDS = 0.1  # of a timed call, beside which starting it is little
REPEATS = 7  # timed calls
MAX_ITERATIONS = 1 << 20


class Timing(NamedTuple):
    """The median of several measurements, and the best."""

    median: float
    best: float

    def per_second(self, amount: float) -> "Timing":
        """The rate of what takes these seconds."""
        return Timing(amount / self.median, amount / self.best)


def time_loop(body: Callable, carry: Any, *constants: Any, clock: Clock = time.perf_counter):
    """Seconds of `body(carry, *constants)`, which returns a new carry, on their devices. In several
    processes all must call it; all run as many iterations."""

    # In place, or a call would begin with a copy to new memory.
    @functools.partial(jax.jit, donate_argnums=1)
    def loop(count, carry, constants):
        return jax.lax.fori_loop(0, count, lambda _, carry: body(carry, *constants), carry)

    carry = jax.tree.map(jnp.copy, carry)
    distributed.compile_in_lockstep(loop, 1, carry, constants)

    def seconds(count: int) -> float:
        nonlocal carry
        start = clock()
        carry = jax.block_until_ready(loop(count, carry, constants))
        return clock() - start

    seconds(1)
    count, last = 1, _agreed(seconds(1))
    while last < MIN_SECONDS and count < MAX_ITERATIONS:
        count *= max(2, min(64, round(1.3 * MIN_SECONDS / max(last, 1e-6))))
        last = _agreed(seconds(count))
    return timing([seconds(count) / count for _ in range(REPEATS)])


def time_calls(call: Callable[[], Any], clock: Clock = time.perf_counter, repeats: int = REPEATS):
    """Seconds of `call()`, which must wait for its own result, after one for warming up."""
    call()
    times = []
    for _ in range(repeats):
        start = clock()
        call()
        times.append(clock() - start)
    return timing(times)


def timing(times: list[float]) -> Timing:
    """Median and best of these seconds."""
    return Timing(statistics.median(times), min(times))


def _agreed(seconds: float) -> float:
    """Process 0's figure, in every process."""
    return distributed.broadcast_from_primary(lambda: seconds)
