"""Collectives along each axis of a mesh, of the kinds that the programs have."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from grok.calibrate.rates import COLUMNS, Devices
from grok.calibrate.timing import Timing

CPU_BYTES, LARGE_BYTES = 2**22, 2**26  # that a device has


def collective_rates(devices: Devices) -> dict[str, dict[str, Timing]]:
    """Bytes/s that a device sends, by mesh axis and kind of collective, of the axes that have
    several devices, all groups along an axis at once. Bytes are counted as `grok plan` counts them:
    by the algorithm that sends least."""
    rows = (CPU_BYTES if devices.is_cpu else LARGE_BYTES) // (4 * COLUMNS)
    axes = [axis for axis, size in devices.mesh.shape.items() if size > 1]
    return {axis: _axis_rates(devices, axis, rows) for axis in axes}


def _axis_rates(devices: Devices, axis: str, rows: int) -> dict[str, Timing]:
    """Rates along one axis, of at least so many rows a device."""
    n = devices.mesh.shape[axis]
    rows = -(-rows // n) * n

    def ones(key):
        return jnp.ones((rows, COLUMNS), jnp.float32) + 0 * jax.random.uniform(key)

    return {
        kind: devices.time(body, ones).per_second(sent)
        for kind, (body, sent) in bodies(axis, n, rows * COLUMNS * 4).items()
    }


def bodies(axis: str, n: int, size: int) -> dict[str, tuple[Callable, float]]:
    """By kind, a function of one device's array of `size` bytes to another like it, and the bytes
    that each of the `n` devices along the axis sends."""
    return {
        "all-gather": (lambda x: _gather(x, axis, n), size * (n - 1) / n),
        "reduce-scatter": (lambda x: _scatter(x, axis, n), size * (n - 1) / n),
        "all-reduce": (lambda x: jax.lax.psum(x, axis) * (1 / n), 2 * size * (n - 1) / n),
        "all-to-all": (lambda x: _exchange(x, axis), size * (n - 1) / n),
        "collective-permute": (lambda x: _pass_on(x, axis, n), size),
    }


def _gather(x, axis: str, n: int):
    """The first rows of all devices; those of the last one then take the place of each one's."""
    part = x[: len(x) // n]
    gathered = jax.lax.optimization_barrier(jax.lax.all_gather(part, axis, tiled=True))
    return x.at[: len(part)].set(gathered[-len(part) :])


def _scatter(x, axis: str, n: int):
    part = jax.lax.psum_scatter(x, axis, tiled=True) * (1 / n)
    return x.at[: len(part)].set(part)


def _exchange(x, axis: str):
    return jax.lax.all_to_all(x, axis, 0, 0, tiled=True)


def _pass_on(x, axis: str, n: int):
    return jax.lax.ppermute(x, axis, [(i, (i + 1) % n) for i in range(n)])
