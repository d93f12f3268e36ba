"""Arrays that several hosts hold copies of, such as all of a second slice: hosts restore disjoint
parts of them, and gather the rest over the network of the devices."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from grok.weights import exchange
from grok.weights.read_plan import MeshProcesses, Move, ReadPlan, spec_of, split_axes
from grok.weights.transfer import MeshDevices

Leaves = dict[str, jax.ShapeDtypeStruct]


def read_once(
    leaves: Leaves,
    chunk_shape: Callable[[str], tuple[int, ...]],
    read: Callable[[Leaves], dict[str, jax.Array]],
) -> dict[str, jax.Array]:
    """The arrays of `leaves`, by name, that `read` reads in any sharding. Parts of an array are
    read in multiples of its `chunk_shape`."""
    plans = {name: _plan(leaf, chunk_shape(name)) for name, leaf in leaves.items()}
    arrays = read({name: _as_read(leaf, plans[name]) for name, leaf in leaves.items()})
    for name, leaf in leaves.items():
        # One at a time, each in the place of what was read.
        arrays[name] = _gather(arrays[name], leaf, plans[name])
    return arrays


def plan_copies(leaf: Any, chunk: tuple[int, ...], mesh: MeshProcesses) -> ReadPlan:
    """The plan to restore an array in one batch: mesh axes along which other hosts hold copies
    split the first dimension whose shards are then still multiples of the file's chunks."""
    staying, steps = split_axes(spec_of(leaf), len(leaf.shape)), chunk
    ones = (1,) * len(leaf.shape)
    plan = ReadPlan(leaf.shape, tuple(mesh.sizes.items()), staying, (), leaf.shape, ones)
    lengths, moves = list(plan.shard), []
    for axis in mesh.sizes:
        if axis not in mesh.crossing or any(axis in axes for axes in staying):
            continue
        size = mesh.sizes[axis]
        dims = (d for d, n in enumerate(lengths) if n and n % (size * steps[d]) == 0)
        if (dim := next(dims, None)) is not None:
            lengths[dim] //= size
            moves.append(Move(axis, dim, None))
    return dataclasses.replace(plan, box=plan.shard, moves=tuple(moves))


@functools.cache
def _processes(mesh: Mesh | None) -> MeshProcesses:
    return MeshDevices(mesh).processes


def _plan(leaf: jax.ShapeDtypeStruct, chunk: tuple[int, ...]) -> ReadPlan:
    mesh = leaf.sharding.mesh if isinstance(leaf.sharding, NamedSharding) else None
    return plan_copies(leaf, chunk, _processes(mesh))


def _as_read(leaf: jax.ShapeDtypeStruct, plan: ReadPlan) -> jax.ShapeDtypeStruct:
    if not plan.moves:
        return leaf
    sharding = NamedSharding(leaf.sharding.mesh, plan.read_spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _gather(array: jax.Array, leaf: jax.ShapeDtypeStruct, plan: ReadPlan) -> jax.Array:
    if not plan.moves:
        return array
    sharding = NamedSharding(leaf.sharding.mesh, leaf.sharding.spec)
    gathered = exchange.moved(array, plan, sharding, plan.shard)
    # A leaf may belong in the memory of the host.
    return jax.block_until_ready(jax.device_put(gathered, leaf.sharding))
