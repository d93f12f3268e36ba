"""The reads of all tensors of a source: their plans, and the functions that read their parts."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from grok.weights.read_plan import MeshProcesses, ReadPlan, plan_reads
from grok.weights.source import Source, part_shape
from grok.weights.storage_layout import Part, StorageLayout, merged

# A part of an array, and its values.
Piece = tuple[Part, np.ndarray]
# Where a batch starts in the shards of each array of a tensor.
Starts = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class TensorReads:
    """The reads of one array; or of two, the values and scales of a matrix that is quantised while
    it is read. `read` gives what each of `names` has of a part of the first, whose values take
    `itemsize` bytes on the host meanwhile."""

    names: tuple[str, ...]
    plans: tuple[ReadPlan, ...]
    read: Callable[[Part], tuple[Piece, ...]]
    itemsize: int

    def batches(self) -> Iterator[Starts]:
        """Yields where each batch starts."""
        return zip(*(plan.batches() for plan in self.plans), strict=True)

    def parts(self, starts: Starts, devices: list[dict[str, int]]) -> list[Part]:
        """The parts of a batch that the process of `devices`, by their coordinates, reads."""
        return merged([self.plans[0].read_part(device, starts[0]) for device in devices])

    def part_bytes(self, part: Part) -> int:
        """Bytes of a part of the first array on the host."""
        return math.prod(part_shape(part)) * self.itemsize


def tensor_reads(
    source: Source, leaves: Mapping[str, Any], mesh: MeshProcesses
) -> Iterator[TensorReads]:
    """Yields reads that fill all `leaves` of a model, arrays by name; int8 matrices are two,
    `NAME/values` and `NAME/scales`."""

    def one(name: str, layout: StorageLayout, read: Callable[[Part], np.ndarray]) -> TensorReads:
        plan = plan_reads(leaves[name], layout, mesh)
        itemsize = max(np.dtype(leaves[name].dtype).itemsize, layout.host_itemsize)
        return TensorReads((name,), (plan,), lambda part: ((part, read(part)),), itemsize)

    for name, spec in source.tensors.items():
        layout, read = source.layout(name), functools.partial(source.read, name)
        if spec.groups is None:
            yield one(name, layout, read)
            continue
        values = one(f"{name}/values", layout, read)
        scales = leaves[f"{name}/scales"]
        if layout.uncut:
            plan = values.plans[0].of_scales(spec.param, scales)
            names, plans = (*values.names, f"{name}/scales"), (*values.plans, plan)
            both = functools.partial(_read_quantized, source, name, scales.shape)
            yield TensorReads(names, plans, both, values.itemsize)
        else:
            yield values
            axis = spec.param.lead_dims
            repeats = scales.shape[axis] // spec.groups
            layout = source.scales_layout(name).repeated(axis, repeats)
            read = functools.partial(_read_scales, source, name, repeats)
            yield one(f"{name}/scales", layout, read)


def _read_scales(source: Source, name: str, repeats: int, part: Part) -> np.ndarray:
    """Scales where the model on this mesh has each group as `repeats` groups of the same scale."""
    axis = source.tensors[name].param.lead_dims
    numbers = np.arange(part[axis].start, part[axis].stop) // repeats
    groups = slice(int(numbers[0]), int(numbers[-1]) + 1)
    scales = source.read_scales(name, (*part[:axis], groups, *part[axis + 1 :]))
    return np.take(scales, numbers - groups.start, axis=axis) if repeats > 1 else scales


def _read_quantized(
    source: Source, name: str, scales_shape: tuple[int, ...], part: Part
) -> tuple[Piece, Piece]:
    """Values of a part with all rows, and their scales, each group as often as in the model."""
    param = source.tensors[name].param
    lead, _, columns = param.split(part)
    part = (*lead, *param.split(source.tensors[name].full_part)[1], *columns)
    values, scales = source.read_quantized(name, part)
    groups, axis = scales_shape[param.lead_dims], param.lead_dims
    scales = np.repeat(scales, groups // scales.shape[axis], axis=axis)
    return (part, values), ((*lead, slice(0, groups), *columns), scales)


def nbytes_of(leaf: Any) -> int:
    """Bytes of an array that may be abstract, two int4 to a byte."""
    return math.prod(leaf.shape) * jax.dtypes.itemsize_bits(leaf.dtype) // 8
