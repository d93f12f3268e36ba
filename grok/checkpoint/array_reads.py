"""Arrays of a checkpoint -> the devices of a mesh: each host reads what its devices hold."""

import dataclasses
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from grok.storage import StrPath, join
from grok.weights.orbax.array_tree import ArrayTree

# Threads, and so shards on the host at a time; TensorStore reads the chunks of each in parallel.
READERS = 16


@dataclasses.dataclass(frozen=True)
class ArrayReads:
    """The arrays of a checkpoint's items. What is read is compared with its checksums: errors are
    those of ArrayTree."""

    trees: Mapping[str, ArrayTree]

    @classmethod
    def open(cls, folder: StrPath, names: list[str]) -> "ArrayReads":
        """Opens the items `names` of the checkpoint in `folder`."""
        return cls({name: ArrayTree(join(folder, name)) for name in names})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all arrays, by name: `item/a/b`."""
        return {
            f"{item}/{name}": shape
            for item, tree in self.trees.items()
            for name, shape in tree.shapes.items()
        }

    def chunk_shape(self, name: str) -> tuple[int, ...]:
        """The shape of the chunks of an array."""
        item, _, path = name.partition("/")
        layout = self.trees[item].layout(path)
        return layout.chunk or (1,) * len(layout.axes)

    def read(self, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """The arrays by name, in the types and shardings of `targets`. A failure ends it."""
        pool = ThreadPoolExecutor(READERS, thread_name_prefix="grok-restore")
        try:
            pending = {name: self._submit(pool, name, leaf) for name, leaf in targets.items()}
            return {name: _assemble(targets[name], reads) for name, reads in pending.items()}
        finally:
            pool.shutdown(cancel_futures=True)

    def _submit(
        self, pool: ThreadPoolExecutor, name: str, leaf: jax.ShapeDtypeStruct
    ) -> list[Future[list[jax.Array]]]:
        """The reads of the distinct shards of an array that devices of this process hold."""
        holders: dict[tuple, list[jax.Device]] = {}
        parts: dict[tuple, tuple[slice, ...]] = {}
        for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
            bounds = tuple(s.indices(size)[:2] for s, size in zip(index, leaf.shape, strict=True))
            holders.setdefault(bounds, []).append(device)
            parts[bounds] = tuple(slice(*pair) for pair in bounds)
        return [
            pool.submit(self._read_shard, name, leaf, parts[bounds], devices)
            for bounds, devices in holders.items()
        ]

    def _read_shard(
        self,
        name: str,
        leaf: jax.ShapeDtypeStruct,
        part: tuple[slice, ...],
        devices: list[jax.Device],
    ) -> list[jax.Array]:
        item, _, path = name.partition("/")
        values = np.asarray(self.trees[item].read(path, part)).astype(leaf.dtype, copy=False)
        kind = leaf.sharding.memory_kind
        places = [SingleDeviceSharding(device, memory_kind=kind) for device in devices]
        # The values are on the host no longer than until they arrived.
        return jax.block_until_ready([jax.device_put(values, place) for place in places])


def _assemble(leaf: jax.ShapeDtypeStruct, reads: list[Future[list[jax.Array]]]) -> jax.Array:
    shards = [shard for read in reads for shard in read.result()]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)
