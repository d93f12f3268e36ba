"""Moments that stay in the memory of the hosts between steps, and visit the devices for an update.

Matrices alone: counters and vectors are small, and stay.
"""

from typing import Any

import jax

HOST = "pinned_host"


def placed_on_host(tree: Any) -> Any:
    """The abstract arrays of a tree with its matrices in the hosts' memory."""

    def one(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if leaf.ndim < 2:
            return leaf
        place = leaf.sharding.with_memory_kind(HOST)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree.map(one, tree)


def to_device(tree: Any) -> Any:
    """The tree, in a traced program, with what hosts hold on the devices."""
    return jax.tree.map(
        lambda x: jax.device_put(x, jax.memory.Space.Device) if _on_host(x) else x, tree
    )


def back(tree: Any, before: Any) -> Any:
    """The tree where it was as `before`, which is of the same structure."""

    def one(x: jax.Array, was: jax.Array) -> jax.Array:
        return jax.device_put(x, jax.memory.Space.Host) if _on_host(was) else x

    return jax.tree.map(one, tree, before)


def is_on_host(leaf: Any) -> bool:
    """Whether an array, or an abstract one, is in the hosts' memory."""
    return leaf.sharding.memory_kind == HOST


def _on_host(x: jax.Array) -> bool:
    return jax.typeof(x).memory_space == jax.memory.Space.Host
