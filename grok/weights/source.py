"""The interface of weights on disk in any format: named tensors of our tree, read in parts. Every
reader of a format is a `Source`, and so is a conversion of one (`cast.py`)."""

import abc
import dataclasses
import itertools
import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from grok import storage
from grok.config import ModelConfig
from grok.errors import CheckpointError
from grok.model.param_spec import ParamSpec
from grok.weights.storage_layout import Part, StorageLayout

# Called with a tensor's name, the bytes done so far, and all bytes; by one thread at a time.
OnProgress = Callable[[str, int, int], object]


def no_progress(name: str, done: int, total: int) -> None:
    """An `OnProgress` that shows nothing."""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor of a source: its parameter in our tree, and its stored type, a float, int8 or int4.
    The latter have `groups` groups of rows, each with a bfloat16 scale per column, others None."""

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
        """Bytes of the values, two int4 to a byte, and of their scales."""
        scales = 0 if self.groups is None else 2 * math.prod(self.scales_shape)
        bits = 4 if self.dtype.name == "int4" else 8 * self.dtype.itemsize
        return math.prod(self.shape) * bits // 8 + scales

    @property
    def full_part(self) -> Part:
        """The part that is the entire tensor."""
        return tuple(slice(0, size) for size in self.shape)


class Source(abc.ABC):
    """Weights of a model that can be read part by part, by several threads at a time. `format` is
    "xai", "orbax" or "huggingface"; `tensors` holds exactly the names of `param_specs(config)`, in
    order; `step` and `meta` are folder and plain data of a checkpoint of ours. Methods raise
    CheckpointError, with the file, for what cannot be read."""

    format: str
    path: str
    config: ModelConfig
    tensors: Mapping[str, TensorSpec]
    step: str = ""
    meta: Mapping[str, Any] = MappingProxyType({})

    @abc.abstractmethod
    def read(self, name: str, part: Part) -> np.ndarray:
        """Values of a part, in the dtype of the tensor's spec."""

    def read_scales(self, name: str, part: Part) -> np.ndarray:
        """Scales of an int8 tensor, bfloat16; `part` is a part of `TensorSpec.scales_shape`."""
        raise AssertionError(f"{name} is {self.tensors[name].dtype} and has no scales")

    def read_quantized(self, name: str, part: Part) -> tuple[np.ndarray, np.ndarray]:
        """Values of an int8 tensor with all of their rows, and the scales of these."""
        spec = self.tensors[name]
        return self.read(name, part), self.read_scales(name, scales_part(spec, part))

    def layout(self, name: str) -> StorageLayout:
        """The layout of a tensor's values in storage."""
        spec = self.tensors[name]
        return StorageLayout.c_order(len(spec.shape), spec.dtype.itemsize)

    def scales_layout(self, name: str) -> StorageLayout:
        """The layout of an int8 tensor's scales in storage."""
        return StorageLayout.c_order(len(self.tensors[name].scales_shape), 2)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.tensors.values())

    @property
    def dtype(self) -> str:
        """The type of the matrices, as `model.param_dtype` names it."""
        tensors = self.tensors.values()
        return param_dtype([str(spec.dtype) for spec in tensors if spec.param.is_matmul])


def param_dtype(dtypes: Sequence[str]) -> str:
    """`model.param_dtype` of matrices in these types: of int4 and int8 ones that is int4."""
    if "int4" not in dtypes:
        return dtypes[0]
    return "int4_all" if set(dtypes) == {"int4"} else "int4"


class ByteCounter:
    """Counts bytes of all threads, the first `done` of `total` among them, and reports each."""

    def __init__(self, on_progress: OnProgress, total: int, done: int = 0) -> None:
        self._on_progress, self._total, self._done = on_progress, total, done
        self._lock = threading.Lock()
        self.add("", 0)

    def add(self, name: str, nbytes: int) -> None:
        """Counts bytes of the tensor `name`."""
        with self._lock:
            self._done += nbytes
            self._on_progress(name, self._done, self._total)


def layer_pieces(spec: TensorSpec) -> Iterator[tuple[int | None, Part]]:
    """Yields (layer, its part) of a tensor; (None, everything) for one without layers."""
    if not spec.param.is_stacked:
        yield None, spec.full_part
        return
    for layer in range(spec.shape[0]):
        yield layer, (slice(layer, layer + 1), *spec.full_part[1:])


def blocks(spec: TensorSpec, part: Part, limit: int = 1 << 28) -> Iterator[Part]:
    """Yields `part` in C order as parts of one matrix each, or of at most about `limit` bytes. A
    matrix (one layer, one expert) is never cut, and so no group of its scales."""
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
    path: storage.StrPath, offset: int, shape: tuple[int, ...], part: Part, out: np.ndarray
) -> np.ndarray:
    """Fills `out`, in C order, with a part of an array that begins at byte `offset` of a file.
    Raises CheckpointError where the file, local or at gs://, cannot be read or became shorter."""
    assert out.flags.c_contiguous
    starts = _run_offsets(shape, out.itemsize, part) + offset
    data = memoryview(out.reshape(-1).view(np.uint8))
    storage.read_ranges(path, starts.tolist(), data, CheckpointError)
    return out


def _run_offsets(shape: tuple[int, ...], itemsize: int, part: Part) -> np.ndarray:
    """Byte offsets of the longest contiguous runs of `part`, in order; all have one length."""
    strides = [itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    axis = len(shape) - 1
    # Axes behind the last one that is cut are taken entirely.
    while axis > 0 and part[axis] == slice(0, shape[axis]):
        axis -= 1
    starts = np.array([part[axis].start * strides[axis]])
    for cut, stride in reversed(list(zip(part[:axis], strides[:axis], strict=True))):
        starts = np.add.outer(np.arange(cut.start, cut.stop) * stride, starts).reshape(-1)
    return starts


def read_object(path: str) -> dict[str, Any]:
    """The JSON object in a small file."""
    return parse_object(storage.read_bytes(path, CheckpointError), f"{path}:")


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `data`. Raises CheckpointError, which begins with `what`, for others."""
    try:
        content = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique)
    except RecursionError:
        raise CheckpointError(f"{what} is nested too deeply.") from None
    except ValueError as error:
        raise CheckpointError(f"{what} cannot be read as JSON: {error}.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{what} should be a JSON object, and is a {type(content).__name__}.")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{quoted(name)} is there twice")
        values[name] = value
    return values


def quoted(name: str) -> str:
    """A name from a file for messages: shortened, and with control characters escaped."""
    return f"{name!r:.100}"
