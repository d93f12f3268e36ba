"""Plans the reads of a tensor by all processes of a mesh, so that each byte leaves storage once.

A device needs its shard, and shards are often fragments: some columns of every row, or copies of
what other hosts hold. So a process reads other parts, disjoint and contiguous, and collectives move
them (`exchange.py`). The plan decides this for each mesh axis: it stays on the axis of the tensor
that it splits, or it splits a slower one while reading, and the exchange moves it back.

Tensors move in batches: the same box of every device's shard at a time, of bounded size.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import PartitionSpec

from grok.model.param_spec import ParamSpec
from grok.weights.storage_layout import Part, StorageLayout, merged

# Bytes of a device's shard that move at a time, where the tensor can be cut so finely.
DEVICE_BYTES = 1 << 26
# Values read, with padding, relative to those of a batch, for which a slower dimension is taken.
MOST_PADDING = 1.1


@dataclasses.dataclass(frozen=True)
class Move:
    """A mesh axis that splits `read_dim` of what is read and, after the exchange, `target_dim` of
    the tensor instead; None, where all devices along it hold the same."""

    mesh_axis: str
    read_dim: int
    target_dim: int | None


@dataclasses.dataclass(frozen=True)
class ReadPlan:
    """The reads of a tensor of `shape` over a mesh of `sizes`. The axes `staying` on each dimension
    split it while it is read and after; `moves` are in the order of the exchange. A batch is `box`,
    or what is left of it, of each shard. Dimensions are cut at multiples of `steps`."""

    shape: tuple[int, ...]
    sizes: tuple[tuple[str, int], ...]
    staying: tuple[tuple[str, ...], ...]
    moves: tuple[Move, ...]
    box: tuple[int, ...]
    steps: tuple[int, ...]

    @functools.cached_property
    def shard(self) -> tuple[int, ...]:
        """Shape of a device's shard."""
        return tuple(
            size // (self._product(axes) * self._incoming(dim))
            for dim, (size, axes) in enumerate(zip(self.shape, self.staying, strict=True))
        )

    def batches(self) -> Iterator[tuple[int, ...]]:
        """Yields where each batch starts in every device's shard."""
        starts = [range(0, n, b) for n, b in zip(self.shard, self.box, strict=True)]
        return itertools.product(*starts)

    def batch_shape(self, start: Sequence[int]) -> tuple[int, ...]:
        """The shape of the batch that begins at `start` of a shard."""
        dims = zip(self.box, self.shard, start, strict=True)
        return tuple(min(box, size - first) for box, size, first in dims)

    def read_part(self, coordinates: Mapping[str, int], start: Sequence[int]) -> Part | None:
        """The part of the tensor that the device at `coordinates` of the mesh reads of a batch;
        None where others read all of it."""
        lengths = self.batch_shape(start)
        part = tuple(
            self._read_slice(dim, coordinates, start[dim], lengths)
            for dim in range(len(self.shape))
        )
        return None if any(s.start >= s.stop for s in part) else part

    def _read_slice(
        self, dim: int, coordinates: Mapping[str, int], start: int, lengths: tuple[int, ...]
    ) -> slice:
        tile = self.shard[dim] * self._incoming(dim)
        first = self._index(self.staying[dim], coordinates) * tile + start
        length, *pieces = self.split_lengths(dim, lengths)
        stop = first + length
        for axis, piece in zip(self._outgoing(dim), pieces, strict=True):
            first += coordinates[axis] * piece
            stop = min(stop, first + piece)
        return slice(first, stop)

    def split_lengths(self, dim: int, batch_shape: tuple[int, ...]) -> list[int]:
        """Lengths along `dim` of a batch that the axes staying have split, then split by one axis
        after another that splits it only while it is read. The last pieces may be shorter."""
        lengths = [batch_shape[dim] * self._incoming(dim)]
        for axis in self._outgoing(dim):
            step = self.steps[dim] * dict(self.sizes)[axis]
            lengths.append(math.ceil(lengths[-1] / step) * self.steps[dim])
        return lengths

    def read_shape(self, batch_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a device's part of a batch as it is read, with padding."""
        return tuple(self.split_lengths(dim, batch_shape)[-1] for dim in range(len(self.shape)))

    @property
    def read_spec(self) -> PartitionSpec:
        """The mesh axes of each dimension while a batch is read."""
        return PartitionSpec(
            *((*axes, *self._outgoing(dim)) or None for dim, axes in enumerate(self.staying))
        )

    def global_read_shape(self, batch_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the array, sharded by `read_spec`, that holds a batch as it is read."""
        lengths = zip(self.read_shape(batch_shape), self.staying, strict=True)
        return tuple(
            length * self._product(axes) * self._product(self._outgoing(dim))
            for dim, (length, axes) in enumerate(lengths)
        )

    def _outgoing(self, dim: int) -> tuple[str, ...]:
        """Axes that split `dim` only while it is read. The last is the first to move away."""
        return tuple(m.mesh_axis for m in reversed(self.moves) if m.read_dim == dim)

    def _incoming(self, dim: int) -> int:
        return self._product([m.mesh_axis for m in self.moves if m.target_dim == dim])

    def _product(self, axes: Sequence[str]) -> int:
        sizes = dict(self.sizes)
        return math.prod(sizes[axis] for axis in axes)

    def _index(self, axes: Sequence[str], coordinates: Mapping[str, int]) -> int:
        sizes, index = dict(self.sizes), 0
        for axis in axes:
            index = index * sizes[axis] + coordinates[axis]
        return index

    def of_scales(self, param: ParamSpec, leaf: Any) -> "ReadPlan":
        """The plan of the scales, like `leaf`, of a matrix that this plan never cuts along its
        rows: the same reads and batches."""
        shape, groups = leaf.shape, param.lead_dims
        entries = split_axes(spec_of(leaf), len(shape))
        rows = param.contract_axes

        def dim_of(dim: int) -> int:
            return groups if dim in rows else dim - (dim >= rows.stop) * (len(rows) - 1)

        def target_of(move: Move) -> int | None:
            # Where the rows of all devices have the same scales, they go to all.
            dim = None if move.target_dim is None else dim_of(move.target_dim)
            return dim if dim is not None and move.mesh_axis in entries[dim] else None

        moves = tuple(Move(m.mesh_axis, dim_of(m.read_dim), target_of(m)) for m in self.moves)
        moving = {move.mesh_axis for move in moves}
        staying = tuple(tuple(axis for axis in axes if axis not in moving) for axes in entries)
        lead, _, columns = param.split(self.box)
        steps = (*param.split(self.steps)[0], 1, *param.split(self.steps)[2])
        plan = ReadPlan(shape, self.sizes, staying, moves, (*lead, 1, *columns), steps)
        return dataclasses.replace(plan, box=(*lead, plan.shard[groups], *columns))


def spec_of(leaf: Any) -> PartitionSpec:
    """The mesh axes of an array's dimensions; none without a mesh."""
    return getattr(leaf.sharding, "spec", PartitionSpec())


def split_axes(spec: PartitionSpec, ndim: int) -> tuple[tuple[str, ...], ...]:
    """The mesh axes of each of `ndim` dimensions."""
    entries = (*spec, *[None] * ndim)[:ndim]
    return tuple(
        () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        for entry in entries
    )


@dataclasses.dataclass(frozen=True)
class MeshProcesses:
    """The `sizes` of a mesh by axis, and the process of each of its devices, an array of the mesh's
    shape."""

    sizes: Mapping[str, int]
    processes: np.ndarray

    @functools.cached_property
    def devices(self) -> dict[int, list[dict[str, int]]]:
        """By process: the coordinates of its devices, in the order of the mesh."""
        devices: dict[int, list[dict[str, int]]] = {}
        for index in np.ndindex(self.processes.shape):
            coordinates = dict(zip(self.sizes, index, strict=True))
            devices.setdefault(int(self.processes[index]), []).append(coordinates)
        return devices

    @functools.cached_property
    def crossing(self) -> frozenset[str]:
        """Axes along which devices of different processes lie."""
        first = [self.processes.take([0], axis=axis) for axis in range(self.processes.ndim)]
        pairs = zip(self.sizes, first, strict=True)
        return frozenset(name for name, one in pairs if (self.processes != one).any())


def plan_reads(leaf: Any, layout: StorageLayout, mesh: MeshProcesses) -> ReadPlan:
    """The plan for a tensor that is to be like `leaf`, an abstract array with a sharding."""
    return _Planner(leaf, layout, mesh).plan()


class _Planner:
    """Chooses the axes that move, the batch, and the dimensions that moved axes split meanwhile."""

    def __init__(self, leaf: Any, layout: StorageLayout, mesh: MeshProcesses):
        self._shape, self._layout, self._mesh = leaf.shape, layout, mesh
        # On the host a value takes the larger of both forms.
        self._itemsize = max(np.dtype(leaf.dtype).itemsize, layout.host_itemsize)
        self._target = split_axes(spec_of(leaf), len(leaf.shape))
        self._steps = tuple(layout.step(dim) for dim in range(len(leaf.shape)))
        # Dimensions that reads may cut, the slowest first, and then the others.
        self._cuttable = [dim for dim in layout.axes if dim not in layout.uncut]
        self._order = [*self._cuttable, *layout.uncut]

    def plan(self) -> ReadPlan:
        staying, moved = self._choose_moves()
        shard = self._plan(self._target).shard
        box = self._cut(shard, moved)
        moves = self._place(moved, box)
        return dataclasses.replace(self._plan(staying), moves=moves, box=box)

    def _plan(self, staying: Sequence[Sequence[str]]) -> ReadPlan:
        """A plan that only splits the tensor, in one batch."""
        splits, sizes = tuple(map(tuple, staying)), tuple(self._mesh.sizes.items())
        plan = ReadPlan(self._shape, sizes, splits, (), self._shape, self._steps)
        return dataclasses.replace(plan, box=plan.shard)

    def _choose_moves(self) -> tuple[list[list[str]], list[tuple[str, int | None]]]:
        """The axes that stay, by dimension; and those that move with the dimension that they split
        after the exchange, in its order: the fastest dimensions first, of one its slowest axis.
        Axes that move then leave slower dimensions for faster ones, never in a circle."""
        staying, crossing = [list(axes) for axes in self._target], self._mesh.crossing
        copies = crossing.difference(*self._target)
        moved: list[tuple[str, int | None]] = [(a, None) for a in self._mesh.sizes if a in copies]
        for dim in self._order[:0:-1]:
            gone: list[tuple[str, int | None]] = []
            while crossing.intersection(staying[dim]) and not self._reads_well(staying):
                gone.insert(0, (staying[dim].pop(), dim))
            moved += gone
        return staying, moved

    def _reads_well(self, staying: list[list[str]]) -> bool:
        """True where every process reads well what the axes that stay leave to its devices."""
        plan, start = self._plan(staying), (0,) * len(self._shape)
        return all(
            self._layout.reads_well(self._shape, part)
            for devices in self._mesh.devices.values()
            for part in merged([plan.read_part(device, start) for device in devices])
        )

    def _cut(self, shard: tuple[int, ...], moved: list[tuple[str, int | None]]) -> tuple[int, ...]:
        """A box of a shard of at most about DEVICE_BYTES, cut along the slowest axes, and none that
        the exchange splits."""
        box, nbytes = list(shard), self._itemsize * math.prod(shard)
        parts = math.prod(self._mesh.sizes[axis] for axis, _ in moved)
        for dim in self._cuttable:
            if nbytes <= DEVICE_BYTES:
                break
            if any(target == dim for _, target in moved):
                continue
            length = DEVICE_BYTES * box[dim] // nbytes
            # Of even parts, where it is long enough.
            step = math.lcm(self._steps[dim], parts)
            step = step if length >= step else self._steps[dim]
            nbytes //= box[dim]
            box[dim] = min(box[dim], max(length // step, 1) * step)
            nbytes *= box[dim]
        return tuple(box)

    def _place(self, moved: list[tuple[str, int | None]], box: tuple[int, ...]) -> tuple[Move, ...]:
        """The moves, each with the dimension that its axis splits meanwhile."""
        lengths, moves = list(box), []
        for axis, target in moved:
            if target is not None:
                lengths[target] *= self._mesh.sizes[axis]
        for axis, target in moved:
            size = self._mesh.sizes[axis]
            dim = self._dim_for(size, target, lengths)
            lengths[dim] = math.ceil(lengths[dim] / (size * self._steps[dim])) * self._steps[dim]
            moves.append(Move(axis, dim, target))
        return tuple(moves)

    def _dim_for(self, size: int, target: int | None, lengths: list[int]) -> int:
        """The slowest dimension of those before `target` that can be split `size` ways with little
        padding, or the one with the least."""
        slower = self._cuttable
        if target is not None:
            slower = slower[: self._order.index(target)]

        def padded(dim: int) -> float:
            units = math.ceil(lengths[dim] / self._steps[dim])
            return math.ceil(units / size) * size / units

        good = [dim for dim in slower if padded(dim) <= MOST_PADDING]
        return good[0] if good else min(slower, key=padded)
