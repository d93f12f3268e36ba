"""Offloading: moments that lie in host memory between steps, and on the devices for the update.
Only matrices are offloaded; counters and vectors are small, and stay on the devices."""

from typing import Any

import jax

HOST = "pinned_host"


def placed_on_host(tree: Any) -> Any:
    """The abstract arrays of a tree, with its matrices in host memory."""

    def one(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if leaf.ndim < 2:
            return leaf
        sharding = leaf.sharding.with_memory_kind(HOST)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(one, tree)


def to_device(tree: Any) -> Any:
    """Moves the leaves in host memory to the devices; traced."""
    device = jax.memory.Space.Device
    return jax.tree.map(lambda x: jax.device_put(x, device) if _on_host(x) else x, tree)


def back(tree: Any, before: Any) -> Any:
    """Moves leaves to host memory where those of `before`, of the same structure, are; traced."""
    host = jax.memory.Space.Host
    return jax.tree.map(lambda x, y: jax.device_put(x, host) if _on_host(y) else x, tree, before)


def is_on_host(leaf: Any) -> bool:
    """True if an array, concrete or abstract, is in host memory."""
    return leaf.sharding.memory_kind == HOST


def _on_host(x: jax.Array) -> bool:
    return jax.typeof(x).memory_space == jax.memory.Space.Host
