"""Feeding batches to the devices of a mesh, made ahead by threads of each host. A batch of B rows
of T tokens is a pure function of (data, seed, step): nothing but the step is saved to resume."""

from collections.abc import Iterator

import grain
import jax
import jax.numpy as jnp

from grok import sharding
from grok.data.batch_schedule import Batch
from grok.data.packed_batches import PackedBatches
from grok.data.stream_batches import StreamBatches

TrainBatches = StreamBatches | PackedBatches


def global_batches(
    batches: TrainBatches, mesh: jax.sharding.Mesh, steps: range, prefetch: int
) -> Iterator[dict[str, jax.Array]]:
    """The batches of `steps` as global arrays, rows split over the mesh. Every process makes the
    rows of its own devices alone, up to `prefetch` steps ahead, in as many threads."""
    row_sharding = _row_sharding(mesh)

    def load(step: int) -> dict[tuple[int, int], Batch]:
        shape = batches.shape(step)
        indices = row_sharding.addressable_devices_indices_map(shape).values()
        row_ranges = {_row_range(index, shape) for index in indices}
        return {rows: batches.batch(step, slice(*rows)) for rows in row_ranges}

    def to_global(shape: tuple[int, int], local: dict[tuple[int, int], Batch], name: str):
        return jax.make_array_from_callback(
            shape, row_sharding, lambda index: local[_row_range(index, shape)][name]
        )

    options = grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)
    step_numbers = grain.MapDataset.range(steps.start, steps.stop)
    local_batches = step_numbers.map(load).to_iter_dataset(options)
    for step, local in zip(steps, local_batches, strict=True):
        shape = batches.shape(step)
        yield {name: to_global(shape, local, name) for name in next(iter(local.values()))}


def shard_batch(batch: Batch, mesh: jax.sharding.Mesh | None) -> dict[str, jax.Array]:
    """Arrays of a [B, T] batch as global arrays, rows split over the mesh; plain without a mesh.
    Every process holds the whole batch and hands its own devices their rows."""
    if mesh is None:
        return {name: jnp.asarray(array_BT) for name, array_BT in batch.items()}
    row_sharding = _row_sharding(mesh)
    return {
        name: jax.make_array_from_callback(array_BT.shape, row_sharding, array_BT.__getitem__)
        for name, array_BT in batch.items()
    }


def _row_sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(mesh, sharding.spec("batch", "length"))


def _row_range(index: tuple[slice, ...] | None, shape: tuple[int, int]) -> tuple[int, int]:
    """First row of a device's shard of a [B, T] array, and the first after it."""
    assert index is not None  # JAX has None for a device without a shard alone
    start, stop, _ = index[0].indices(shape[0])
    return start, stop
