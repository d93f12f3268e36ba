"""Step times of every host of a run, and the one that holds up the others.

In a synchronous step all wait for the slowest, so the time from step to step is the same on all
hosts. What differs is measured: the seconds of a step that a host spends on data and dispatch, in
which it does not wait for its chips; those in which its threads wait for a processor, as in a
container that has used up its share; and the seconds that its slowest chip takes for a fixed
product of matrices, with all other chips left out."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from grok import distributed
from grok.config import MESH_AXES

LINES = 5  # logged lines in a row in which a host is the slowest before it is named
SLOW_CHIP = 1.25  # times the median of the others
SLOW_HOST = 2.0  # likewise, where that is also
BUSY_SHARE = 0.5  # of the time of a step
WAIT_SHARE = 0.2  # likewise: it makes a step 1.25 times as long
PROBE_SIZE = {"cpu": 128}  # rows of the matrices
PROBE_PRODUCTS = 4


class HostTimes:
    """The measurements of one process. `exchange` is a collective; alone, a process has nothing to
    compare itself with, and measures nothing."""

    def __init__(self, mesh: Mesh):
        self._is_alone = distributed.process_count() == 1
        self._busy, self._steps, self._since = 0.0, 0, time.perf_counter()
        self._streak = Streak()
        if self._is_alone:
            return
        self._waiting = WaitingThreads(Path("/proc/self/task"))
        self._names = distributed.all_gather(distributed.host_name())
        self._processes = [device.process_index for device in mesh.devices.flat]
        self._sharding = NamedSharding(mesh, P(MESH_AXES, None))
        self._replicate = jax.jit(lambda x: jax.sharding.reshard(x, P(None, None)))
        self._probe = Probe()

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Times a block in which this host does not wait for its chips."""
        began = time.perf_counter()
        yield
        self._busy += time.perf_counter() - began

    def count_step(self) -> None:
        """Counts a step since the line before."""
        self._steps += 1

    def exchange(self) -> dict[str, Any]:
        """Fields of a line of metrics, written when the chips have nothing to do: `host_seconds`
        and `wait_seconds` of a step since the line before, and `chip_seconds`, of each process;
        and, where one has been the slowest for long, `slow_host` and `slow_host_reason`."""
        if self._is_alone:
            return {}
        steps, now = max(1, self._steps), time.perf_counter()
        step_seconds = (now - self._since) / steps
        waited = self._waiting.seconds() / steps
        local = np.asarray([[self._busy / steps, self._probe.seconds(), waited]], np.float32)
        self._busy, self._steps, self._since = 0.0, 0, now
        shape = (len(self._processes), local.shape[1])
        array = jax.make_array_from_callback(shape, self._sharding, lambda _: local)
        rows = np.asarray(self._replicate(array)).astype(float)
        times = dict(zip(self._processes, rows.tolist(), strict=True))
        host_s, chip_s, wait_s = ([round(times[i][k], 6) for i in sorted(times)] for k in range(3))
        fields: dict[str, Any] = {
            "host_seconds": host_s,
            "wait_seconds": wait_s,
            "chip_seconds": chip_s,
        }
        slowest = self._streak.add(find_slowest(host_s, chip_s, wait_s, step_seconds))
        if slowest is not None:
            fields["slow_host"] = self._names[slowest.process]
            fields["slow_host_reason"] = f"process {slowest.process}: {slowest.reason}"
        return fields


class Slowest(NamedTuple):
    """The process that holds up the others, and how it does."""

    process: int
    reason: str


class Streak:
    """Names a process that was the slowest in LINES lines in a row."""

    def __init__(self) -> None:
        self._process: int | None = None
        self._lines = 0

    def add(self, slowest: Slowest | None) -> Slowest | None:
        """Counts a line; returns the slowest where it has been so for long."""
        process = slowest and slowest.process
        self._lines = self._lines + 1 if process == self._process else 1
        self._process = process
        return slowest if self._lines >= LINES else None


def find_slowest(
    host_s: list[float], chip_s: list[float], wait_s: list[float], step_seconds: float
) -> Slowest | None:
    """The process whose host lacks processors, or whose chips, or else whose host, take far longer
    than those of the others; None where all are about as fast, or a host keeps no chip waiting."""
    process, share = _share_of_step(wait_s, step_seconds, WAIT_SHARE)
    if share is not None:
        return Slowest(process, f"its threads wait for a processor for {share:.0%} of each step")
    process, ratio = _ratio_to_others(chip_s)
    if ratio >= SLOW_CHIP:
        return Slowest(process, f"its chips take {ratio:.2f} times as long for the same work")
    process, share = _share_of_step(host_s, step_seconds, BUSY_SHARE)
    if share is not None:
        return Slowest(process, f"data and dispatch take {share:.0%} of each step on the host")
    return None


def _share_of_step(
    seconds: list[float], step_seconds: float, share: float
) -> tuple[int, float | None]:
    """The process with the largest of the values, and its share of a step where that is at least
    `share`, and far more than that of the others."""
    process, ratio = _ratio_to_others(seconds)
    is_slow = ratio >= SLOW_HOST and seconds[process] >= share * step_seconds
    return process, min(1.0, seconds[process] / step_seconds) if is_slow else None


def _ratio_to_others(seconds: list[float]) -> tuple[int, float]:
    """The largest of the values, and its ratio to the median of the others."""
    process = int(np.argmax(seconds))
    others = float(np.median(np.delete(seconds, process)))
    if others > 0:
        return process, seconds[process] / others
    return process, np.inf if seconds[process] > 0 else 1.0


class WaitingThreads:
    """The time that threads were ready to run and had no processor, by Linux's count in `tasks`, a
    folder such as /proc/self/task."""

    def __init__(self, tasks: Path):
        self._tasks = tasks
        self._before = self._read()

    def seconds(self) -> float:
        """Seconds since the call before of the thread that waited longest; 0 on other systems."""
        now, before = self._read(), self._before
        self._before = now
        return max((now[task] - before.get(task, 0) for task in now), default=0) / 1e9

    def _read(self) -> dict[str, int]:
        """Nanoseconds by thread: https://docs.kernel.org/scheduler/sched-stats.html"""
        waits = {}
        for file in self._tasks.glob("*/schedstat"):
            # A thread may end meanwhile, and a kernel count nothing.
            with contextlib.suppress(OSError, IndexError, ValueError):
                waits[file.parent.name] = int(file.read_text().split()[1])
        return waits


class Probe:
    """A fixed product of matrices on each chip of this host, alone."""

    def __init__(self) -> None:
        size = PROBE_SIZE.get(jax.default_backend(), 4096)
        ones = np.ones((size, size), jnp.bfloat16)
        arrays = [jax.device_put(ones, device) for device in jax.local_devices()]
        # Compiled here: a call that compiles would ask for the mesh of the run.
        self._programs = [(jax.jit(_products).lower(array).compile(), array) for array in arrays]

    def seconds(self) -> float:
        """Time of the slowest chip, the better of two."""
        return max(min(_time(*program) for _ in range(2)) for program in self._programs)


def _time(program: Callable, array: jax.Array) -> float:
    began = time.perf_counter()
    program(array).block_until_ready()
    return time.perf_counter() - began


def _products(x: jax.Array) -> jax.Array:
    y = x
    for _ in range(PROBE_PRODUCTS):
        y = (y @ x) * jnp.bfloat16(1 / x.shape[0])
    return y


def slow_host(line: Mapping[str, Any]) -> str | None:
    """The sentence on the host that a line of metrics names; None where it names none."""
    name = line.get("slow_host")
    return name and f"the slowest host is {name}, {line.get('slow_host_reason')}"
