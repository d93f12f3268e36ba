"""Rates of a device while all devices work: products by type, memory, and the way between its
memory and its host's."""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from grok.calibrate.timing import Clock, Timing, time_calls, time_loop

# Rows and columns of the matrices, and bytes of the array, of a device: enough to fill a chip, and
# beyond caches.
CPU_MATRIX, CPU_ARRAY = 1024, 2**27
LARGE_MATRIX, LARGE_ARRAY = 8192, 2**30
TRANSFER_BYTES = 2**28
COLUMNS = 1024
TYPES = ("bfloat16", "float32", "int8")


class Devices:
    """The devices of a mesh, each with an array of its own."""

    def __init__(self, mesh: Mesh, clock: Clock = time.perf_counter):
        self.mesh, self.clock = mesh, clock
        self.is_cpu = mesh.devices.flat[0].platform == "cpu"

    def time(self, body: Callable, carry: Callable, *constants: Callable) -> Timing:
        """Seconds of `body(carry, *constants)` on every device at once; the arguments make the
        arrays of one device from its key."""
        arrays = [self.make(make) for make in (carry, *constants)]
        spec = P(self.mesh.axis_names)
        sharded = jax.shard_map(
            body, mesh=self.mesh, in_specs=(spec,) * len(arrays), out_specs=spec, check_vma=False
        )
        return time_loop(sharded, *arrays, clock=self.clock)

    def make(self, make: Callable) -> jax.Array:
        """An array of all devices, whose rows are those that each makes."""
        names = self.mesh.axis_names

        def one() -> jax.Array:
            return make(jax.random.fold_in(jax.random.key(0), jax.lax.axis_index(names)))

        with jax.set_mesh(self.mesh):
            return jax.jit(jax.shard_map(one, in_specs=(), out_specs=P(names)))()


def matmul_rates(devices: Devices) -> dict[str, Timing]:
    """FLOP/s of products of square matrices, by the type of both; int8 ones are summed in int32,
    float32 ones have the precision that a model's have."""
    size = CPU_MATRIX if devices.is_cpu else LARGE_MATRIX
    return {dtype: matmul_rate(devices, dtype, size) for dtype in TYPES}


def matmul_rate(devices: Devices, dtype: str, size: int) -> Timing:
    """FLOP/s of products of matrices of `size` rows and columns."""

    def integers(key):
        return jax.random.randint(key, (size, size), -127, 128, jnp.int8)

    def multiply(y, x, w):
        return jnp.matmul(y, w, preferred_element_type=jnp.int32).astype(jnp.int8) ^ x

    def floats(key):
        # So that no value grows from one product to the next.
        return 0.25 * size**-0.5 * jax.random.normal(key, (size, size), dtype)

    def multiply_add(y, x, w):
        return (
            jnp.matmul(y, w, preferred_element_type=jnp.float32) + x.astype(jnp.float32)
        ).astype(y.dtype)

    make, body = (integers, multiply) if dtype == "int8" else (floats, multiply_add)
    return devices.time(body, make, make, make).per_second(2 * size**3)


def memory_rates(devices: Devices) -> dict[str, Timing]:
    """Bytes/s of memory, where an array is `read`, and where one is read and written (`copy`, both
    counted)."""
    size = CPU_ARRAY if devices.is_cpu else LARGE_ARRAY
    rows = size // (4 * COLUMNS)

    def ones(key):
        return jnp.ones((rows, COLUMNS), jnp.float32) + 0 * jax.random.uniform(key)

    def sums(key):
        return jnp.zeros(rows, jnp.float32) + 0 * jax.random.uniform(key)

    def add_rows(s, x):
        return 1e-4 * jnp.sum(jnp.maximum(x, s[:, None]), axis=1)

    read = devices.time(add_rows, sums, ones)
    copy = devices.time(lambda x: 0.5 * x + 0.5, ones)
    return {"read": read.per_second(size), "copy": copy.per_second(2 * size)}


def host_link_rates(devices: Devices) -> dict[str, Timing] | None:
    """Bytes/s from the host's memory to a device's and back, while all devices copy; None where
    both are the same memory, or a device cannot address the host's."""
    kinds = {memory.kind for memory in devices.mesh.local_devices[0].addressable_memories()}
    if devices.is_cpu or "pinned_host" not in kinds:
        return None
    return time_transfers(devices, TRANSFER_BYTES)


def time_transfers(devices: Devices, size: int) -> dict[str, Timing]:
    """Bytes/s of copies of `size` bytes a device, `to_device` and `to_host`."""
    spec = P(devices.mesh.axis_names)
    there, here = (
        NamedSharding(devices.mesh, spec, memory_kind=kind) for kind in ("device", "pinned_host")
    )
    on_device = devices.make(lambda key: jax.random.uniform(key, (size // 4,)))
    # In a program, since no process addresses the devices of the others.
    to_device, to_host = (
        jax.jit(lambda x, place=place: jax.device_put(x, place), out_shardings=place)
        for place in (there, here)
    )
    on_host = to_host(on_device)

    def rate(move: Callable, x: jax.Array) -> Timing:
        copy = functools.partial(move, x)
        return time_calls(lambda: jax.block_until_ready(copy()), devices.clock).per_second(size)

    return {"to_device": rate(to_device, on_host), "to_host": rate(to_host, on_device)}


def dispatch_seconds(clock: Clock = time.perf_counter) -> Timing:
    """Seconds from a call of the smallest program to its result on the host."""
    add = jax.jit(lambda x: x + 1)
    x = jnp.zeros((), jnp.int32)
    return time_calls(lambda: np.asarray(add(x)), clock, repeats=101)
