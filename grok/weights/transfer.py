"""Fills arrays on the devices of a mesh with what processes read, batch by batch."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from grok.weights import exchange
from grok.weights.read_plan import MeshProcesses, ReadPlan, spec_of
from grok.weights.source import relative_to
from grok.weights.storage_layout import Part
from grok.weights.tensor_reads import Piece, Starts, TensorReads, nbytes_of


class MeshDevices:
    """The devices of a mesh, or the default one: `processes` says whose they are, and `local` has
    those of this process with their coordinates."""

    def __init__(self, mesh: Mesh | None):
        self._mesh = mesh
        grid: Any = np.array(jax.devices()[0]) if mesh is None else mesh.devices
        sizes: dict[str, int] = {} if mesh is None else dict(mesh.shape)
        processes = [device.process_index for device in grid.reshape(-1)]
        self.processes = MeshProcesses(sizes, np.reshape(processes, grid.shape))
        self.local: dict[jax.Device, dict[str, int]] = {
            grid[index]: dict(zip(sizes, index, strict=True))
            for index in np.ndindex(grid.shape)
            if grid[index].process_index == jax.process_index()
        }

    def sharding(self, spec: PartitionSpec) -> Sharding:
        """The sharding by mesh axes, or on the one device."""
        if self._mesh is None:
            return SingleDeviceSharding(next(iter(self.local)))
        return NamedSharding(self._mesh, spec)


class _Target:
    """An array, like `leaf`, that is filled batch by batch as `plan` says."""

    def __init__(self, leaf: jax.ShapeDtypeStruct, plan: ReadPlan, devices: MeshDevices):
        self._leaf, self._plan, self._devices = leaf, plan, devices
        self.array: jax.Array | None = None

    def write(self, start: tuple[int, ...], pieces: Sequence[Piece]) -> int:
        """Moves a batch to the devices that hold it; `pieces` have all that this process reads of
        it. Returns the bytes of the batch, of all processes."""
        plan, devices = self._plan, self._devices
        batch_shape = plan.batch_shape(start)
        shape = plan.read_shape(batch_shape)
        blocks = [
            jax.device_put(self._block(pieces, plan.read_part(at, start), shape), device)
            for device, at in devices.local.items()
        ]
        sharding = devices.sharding(spec_of(self._leaf))
        as_read = devices.sharding(plan.read_spec) if plan.moves else sharding
        block = jax.make_array_from_single_device_arrays(
            plan.global_read_shape(batch_shape), as_read, blocks
        )
        if plan.box == plan.shard:
            self.array = exchange.moved(block, plan, sharding, batch_shape)
        else:
            if self.array is None:
                self.array = exchange.empty(self._leaf.shape, self._leaf.dtype, sharding)
            self.array = exchange.written(self.array, block, start, plan)
        # Bounds the memory of host and devices; and on CPU, two collectives at a time may mix.
        jax.block_until_ready(self.array)
        share = math.prod(batch_shape) / math.prod(plan.shard)
        return round(share * nbytes_of(self._leaf))

    def _block(
        self, pieces: Sequence[Piece], part: Part | None, shape: tuple[int, ...]
    ) -> np.ndarray:
        """The values of `part`, at the beginning of an array of `shape`."""
        if part is None:
            return np.zeros(shape, self._leaf.dtype)
        values = np.ascontiguousarray(_values(pieces, part))
        padding = [(0, size - length) for size, length in zip(shape, values.shape, strict=True)]
        return np.pad(values, padding) if values.shape != shape else values


def _values(pieces: Iterable[Piece], part: Part) -> np.ndarray:
    for box, values in pieces:
        pairs = zip(box, part, strict=True)
        if all(outer.start <= s.start and s.stop <= outer.stop for outer, s in pairs):
            return values[relative_to(box, part)]
    raise AssertionError(f"{part} was not read")


class Transfer:
    """A tensor on its way to the devices of a mesh. `reads` says what each process reads, and
    `leaves` what its arrays, by name, will be like; `arrays` are these as far as they are filled.
    """

    def __init__(self, reads: TensorReads, leaves: Mapping[str, Any], devices: MeshDevices):
        self.reads = reads
        self._targets = [
            _Target(leaves[name], plan, devices)
            for name, plan in zip(reads.names, reads.plans, strict=True)
        ]

    @property
    def arrays(self) -> dict[str, jax.Array | None]:
        """The arrays by name."""
        return {n: t.array for n, t in zip(self.reads.names, self._targets, strict=True)}

    def place(self, starts: Starts, parts: Sequence[tuple[Piece, ...]]) -> int:
        """Moves a batch, its parts as `reads.read` gave them, to the devices; returns its bytes, of
        all processes. A collective, also where other processes have read all of it."""
        return sum(
            target.write(start, [pieces[number] for pieces in parts])
            for number, (target, start) in enumerate(zip(self._targets, starts, strict=True))
        )
