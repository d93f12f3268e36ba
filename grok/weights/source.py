"""The interface of weights on disk in any format: named tensors of our tree, read in parts.

Every reader of a format is a `Source`, and so is a conversion of one (`cast.py`). Loading onto a
mesh, importing, exporting and comparing work with any source.
"""

import abc
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from grok import storage
from grok.config import ModelConfig
from grok.errors import CheckpointError
from grok.model.param_spec import ParamSpec

# A slice with start and stop, and no step, for each axis.
Part = tuple[slice, ...]
# Called with a tensor's name, the bytes done so far, and all bytes; by one thread at a time.
OnProgress = Callable[[str, int, int], object]


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor of a source: its name and shape in our tree, and its stored type.

    `dtype` is float32, bfloat16, float16 or int8; int8 values go with `groups` groups of rows, each
    with a scale per column, bfloat16 (`grok.ops.weights.int8`). Otherwise `groups` is None.
    """

    param: ParamSpec
    dtype: np.dtype
    groups: int | None = None

    @property
    def name(self) -> str:
        """The tensor's name in our tree."""
        return self.param.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        return self.param.shape

    @property
    def scales_shape(self) -> tuple[int, ...]:
        """Shape of the scales of int8 values."""
        assert self.groups is not None
        return self.param.scales_shape(self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes of the values and, of int8 values, their scales."""
        scales = 0 if self.groups is None else 2 * math.prod(self.scales_shape)
        return math.prod(self.shape) * self.dtype.itemsize + scales

    @property
    def full_part(self) -> Part:
        """The part that is the entire tensor."""
        return tuple(slice(0, size) for size in self.shape)


class Source(abc.ABC):
    """Weights of a model that can be read part by part, by several threads at a time.

    `format` is "xai", "orbax" or "huggingface"; `path` says where, for messages; `tensors` holds
    exactly the names of `grok.model.params.param_specs(config)`, in that order. `stores_rows` says
    that a file has the rows of a matrix one after the other. Methods raise CheckpointError, with
    the file, for what cannot be read.
    """

    format: str
    stores_rows: bool = False
    path: str
    config: ModelConfig
    tensors: Mapping[str, TensorSpec]

    @abc.abstractmethod
    def read(self, name: str, part: Part) -> np.ndarray:
        """Values of a part, in the dtype of the tensor's spec."""

    def read_scales(self, name: str, part: Part) -> np.ndarray:
        """Scales of an int8 tensor, bfloat16; `part` is a part of `TensorSpec.scales_shape`."""
        raise AssertionError(f"{name} is {self.tensors[name].dtype} and has no scales")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.tensors.values())

    @property
    def dtype(self) -> str:
        """The type of the matrices."""
        return str(next(spec.dtype for spec in self.tensors.values() if spec.param.is_matmul))


def layer_pieces(spec: TensorSpec) -> Iterator[tuple[int | None, Part]]:
    """Yields (layer, its part) of a tensor; (None, everything) for one without layers."""
    if not spec.param.is_stacked:
        yield None, spec.full_part
        return
    for layer in range(spec.shape[0]):
        yield layer, (slice(layer, layer + 1), *spec.full_part[1:])


def blocks(spec: TensorSpec, part: Part, limit: int = 1 << 28) -> Iterator[Part]:
    """Yields `part` in C order as parts of one matrix each, or of at most about `limit` bytes.

    A matrix (one layer, one expert) is never cut, and so no group of its scales.
    """
    if spec.param.is_matmul:
        lead = spec.param.lead_dims
        for index in itertools.product(*(range(s.start, s.stop) for s in part[:lead])):
            yield (*(slice(i, i + 1) for i in index), *part[lead:])
        return
    row_bytes = math.prod(s.stop - s.start for s in part[1:]) * spec.dtype.itemsize
    rows = max(1, limit // row_bytes)
    for start in range(part[0].start, part[0].stop, rows):
        yield (slice(start, min(start + rows, part[0].stop)), *part[1:])


def scales_part(spec: TensorSpec, part: Part) -> Part:
    """The scales of a `part` that `blocks` yields."""
    assert spec.groups is not None
    lead, _, columns = spec.param.split(part)
    return (*lead, slice(0, spec.groups), *columns)


def part_shape(part: Part) -> tuple[int, ...]:
    """The shape of the values that `part` selects."""
    return tuple(s.stop - s.start for s in part)


def relative_to(outer: Part, part: Sequence[slice]) -> Part:
    """`part` of an array as a part of `outer`, in which it lies."""
    pairs = zip(part, outer, strict=True)
    return tuple(slice(s.start - o.start, s.stop - o.start) for s, o in pairs)


def read_part(
    path: storage.StrPath, offset: int, shape: tuple[int, ...], dtype: np.dtype, part: Part
) -> np.ndarray:
    """Part of an array in C order that begins at byte `offset` of a file, local or at gs://.

    Raises CheckpointError where the file cannot be read or became shorter.
    """
    out = np.empty(part_shape(part), dtype)
    read_into(out, path, offset, shape, part)
    return out


def read_into(
    out: np.ndarray, path: storage.StrPath, offset: int, shape: tuple[int, ...], part: Part
) -> None:
    """`read_part` into an array of the part's shape, in C order."""
    assert out.flags.c_contiguous
    starts = _run_offsets(shape, out.itemsize, part) + offset
    data = memoryview(out.reshape(-1).view(np.uint8))
    storage.read_ranges(path, starts.tolist(), data, CheckpointError)


def _run_offsets(shape: tuple[int, ...], itemsize: int, part: Part) -> np.ndarray:
    """Byte offsets in a C-ordered array of the contiguous runs of `part`, as long as they can be.

    They are in order, and all runs have one length.
    """
    strides = [itemsize]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    axis = len(shape) - 1
    # Axes behind the last one that is cut are taken entirely.
    while axis > 0 and part[axis] == slice(0, shape[axis]):
        axis -= 1
    starts = np.array([part[axis].start * strides[axis]])
    for cut, stride in reversed(list(zip(part[:axis], strides[:axis], strict=True))):
        starts = np.add.outer(np.arange(cut.start, cut.stop) * stride, starts).reshape(-1)
    return starts
