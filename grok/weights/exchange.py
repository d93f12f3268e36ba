"""Moves what processes have read to the devices where it belongs, over the interconnect."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from grok.model.build import quick_to_compile
from grok.weights.read_plan import ReadPlan


def exchange(block: jax.Array, plan: ReadPlan, batch_shape: tuple[int, ...]) -> jax.Array:
    """Inside `shard_map`: a device's part of a batch, as read -> the batch of its shard."""
    lengths = [plan.split_lengths(dim, batch_shape) for dim in range(block.ndim)]
    for move in plan.moves:
        dim = move.read_dim
        if move.target_dim is None:
            block = jax.lax.all_gather(block, move.mesh_axis, axis=dim, tiled=True)
        else:
            block = jax.lax.all_to_all(block, move.mesh_axis, move.target_dim, dim, tiled=True)
        lengths[dim].pop()
        # The last parts have padding.
        block = jax.lax.slice_in_dim(block, 0, lengths[dim][-1], axis=dim)
    return block


def moved(
    block: jax.Array, plan: ReadPlan, sharding: Sharding, batch_shape: tuple[int, ...]
) -> jax.Array:
    """A batch that is the whole tensor, as read -> the tensor, sharded by `sharding`."""
    if not plan.moves:
        return block
    return _compiled(plan, sharding, batch_shape, False)(block)


def written(
    target: jax.Array, block: jax.Array, start: tuple[int, ...], plan: ReadPlan
) -> jax.Array:
    """`target`, which is donated, with a batch, as read, at `start` of every shard."""
    return _compiled(plan, target.sharding, plan.batch_shape(start), True)(target, block, start)


@functools.cache
def _compiled(
    plan: ReadPlan, sharding: Sharding, batch_shape: tuple[int, ...], writes: bool
) -> Callable[..., jax.Array]:
    def move(block):
        return exchange(block, plan, batch_shape)

    def write(target, block, start):
        return jax.lax.dynamic_update_slice(target, move(block), start)

    f, donated = (write, (0,)) if writes else (move, ())
    if isinstance(sharding, NamedSharding):
        as_read = plan.read_spec if plan.moves else sharding.spec
        in_specs = (sharding.spec, as_read, PartitionSpec()) if writes else (as_read,)
        f = jax.shard_map(
            f, mesh=sharding.mesh, in_specs=in_specs, out_specs=sharding.spec, check_vma=False
        )
    return jax.jit(f, donate_argnums=donated, compiler_options=quick_to_compile())


def empty(shape: tuple[int, ...], dtype, sharding: Sharding) -> jax.Array:
    """An array to write batches into."""
    return _compiled_empty(shape, jnp.dtype(dtype), sharding)()


@functools.cache
def _compiled_empty(shape: tuple[int, ...], dtype: jnp.dtype, sharding: Sharding) -> Callable:
    zeros = functools.partial(jnp.zeros, shape, dtype)
    return jax.jit(zeros, out_shardings=sharding, compiler_options=quick_to_compile())
