"""Two checkpoints compared tensor by tensor, whatever their formats and types.

The question is whether what arrived came out right, so weights of different kinds are compared in
the coarser one's type: int8 is dequantised to the other's float type, and of two float types the
finer is rounded to the coarser. int8 against int8 is compared as stored, values and scales bit for
bit; only with other groups of scales are both dequantised, exactly, to float32.

A matrix of each source is held at a time while the next is read, and compared in chunks.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import ml_dtypes
import numpy as np

from grok import storage
from grok.config import GrokConfig
from grok.errors import CheckpointError
from grok.model import params
from grok.weights.checksums import piece_checksum
from grok.weights.detect import open_source
from grok.weights.orbax.source import OrbaxSource
from grok.weights.source import (
    Part,
    Source,
    TensorSpec,
    blocks,
    layer_pieces,
    part_shape,
    scales_part,
)
from grok.weights.tools.array_difference import ArrayDifference, array_difference

# From fine to coarse.
FLOATS = tuple(np.dtype(kind) for kind in (np.float32, np.float16, ml_dtypes.bfloat16))
FLOAT32, INT8 = np.dtype(np.float32), np.dtype(np.int8)
# In numbers; a chunk and what is computed from it should stay in a core's cache.
CHUNK = 1 << 18

# Fields of a config that say how a model is run; the others say what it computes.
HOW_IT_RUNS = ("context_length", "param_dtype", "compute_dtype", "remat")

# Told of a tensor's name, the bytes read and done with, and all bytes.
Progress = Callable[[str, int, int], object]


@dataclasses.dataclass(frozen=True)
class Method:
    """How two tensors are compared: both brought to `dtype`; `words` say it to people.

    `dtype` int8 means as stored: values in steps of int8, and scales. `quantization` tells int8
    against floats, whose difference is an error of quantisation.
    """

    dtype: np.dtype
    words: str
    quantization: bool = False


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One tensor of two sources; `scales` is None but for int8 compared as stored."""

    spec: TensorSpec
    method: Method
    values: ArrayDifference
    scales: ArrayDifference | None

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.values.differing and not (self.scales and self.scales.differing)

    def farthest(self, of_scales: bool = False) -> tuple[int | None, tuple[int, ...]]:
        """Layer and index (an axis for each of the tensor's but L) of the largest difference."""
        found = self.scales if of_scales else self.values
        assert found is not None and found.place is not None
        shape = self.spec.scales_shape if of_scales else self.spec.shape
        index = tuple(int(i) for i in np.unravel_index(found.place, shape))
        return (index[0], index[1:]) if self.spec.name.startswith("layers/") else (None, index)


@dataclasses.dataclass(frozen=True)
class BlockValues:
    """A part of a tensor that `blocks` gives, as a source keeps it.

    `values` is (rows, columns), `scales` (groups, columns), with no groups for floats.
    """

    values: np.ndarray
    scales: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes

    def rows(self, start: int, stop: int, dtype: np.dtype) -> np.ndarray:
        """Some rows in `dtype`: a float type, or int8 for the values as they are."""
        values = self.values[start:stop]
        if dtype == INT8 or not len(self.scales):
            return values.astype(dtype, copy=False)
        groups = np.arange(start, stop) * len(self.scales) // len(self.values)
        scales = self.scales[groups[0] : groups[-1] + 1].astype(FLOAT32)
        if len(scales) > 1:
            scales = scales[groups - groups[0]]
        return (values.astype(FLOAT32) * scales).astype(dtype)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """The first row, and that after the last, of chunks to compute with one after another."""
        rows, columns = self.values.shape
        step = max(1, CHUNK // columns)
        return ((start, min(start + step, rows)) for start in range(0, rows, step))


@dataclasses.dataclass(frozen=True)
class ChecksumResult:
    """One tensor against its checksums: how many there are, and the layers (None for a tensor
    without) where the weights have another."""

    spec: TensorSpec
    checksums: int
    differing: tuple[int | None, ...]

    @property
    def equal(self) -> bool:
        """Whether every checksum is the kept one."""
        return not self.differing


def open_both(
    a: str | os.PathLike[str], b: str | os.PathLike[str], config: GrokConfig | None = None
) -> tuple[Source, Source]:
    """The sources at two paths. A release tells only part of its config, so without `config` it is
    opened with the other's. Raises CheckpointError as `open_source` does."""
    if config is None and _is_release(a) and not _is_release(b):
        second = open_source(b)
        return open_source(a, second.config), second
    first = open_source(a, config)
    return first, open_source(b, first.config if _is_release(b) else config)


def _is_release(path: str | os.PathLike[str]) -> bool:
    return any(name.startswith("tensor0") for name in storage.list_files(path, CheckpointError))


def check_comparable(a: Source, b: Source) -> None:
    """Raises CheckpointError where the two are not of one model: what differs, and how."""
    between = f"{a.path} and {b.path} are of different models"
    for name, spec in a.tensors.items():
        other = b.tensors[name].shape
        if spec.shape != other:
            raise CheckpointError(
                f"{between}: {name} is {spec.shape} in the first and {other} in the second."
            )
    field = differing_field(a.config, b.config)
    if field is not None:
        values = [getattr(source.config, field) for source in (a, b)]
        raise CheckpointError(
            f"{between}: {field} is {values[0]} in the first and {values[1]} in the second."
        )


def differing_field(a: GrokConfig, b: GrokConfig) -> str | None:
    """A field by which the two compute different things, if there is one.

    Configs of others may have fewer digits, and 1/sqrt(128) depends on who computes it.
    """
    fields = [f.name for f in dataclasses.fields(GrokConfig) if f.name not in HOW_IT_RUNS]
    for name in fields:
        if not math.isclose(getattr(a, name), getattr(b, name), rel_tol=1e-6):
            return name
    return None


def method(a: TensorSpec, b: TensorSpec) -> Method:
    """How two tensors of these types are compared."""
    kinds = f"{a.dtype} with {b.dtype}"
    if a.groups is not None and a.groups == b.groups:
        return Method(INT8, f"{kinds}: values (in steps) and scales, bit for bit")
    if a.groups is not None and b.groups is not None:
        return Method(FLOAT32, f"{kinds} in other groups: dequantised to float32")
    if a.groups is not None or b.groups is not None:
        dtype = b.dtype if a.groups is not None else a.dtype
        return Method(dtype, f"{kinds}: dequantised to {dtype}", quantization=True)
    if a.dtype == b.dtype:
        return Method(a.dtype, f"{kinds}: bit for bit")
    coarse = max(a.dtype, b.dtype, key=FLOATS.index)
    return Method(coarse, f"{kinds}: rounded to {coarse}")


def compare(
    a: Source,
    b: Source,
    tolerance: float = 0.0,
    progress: Progress = lambda name, done, total: None,
) -> Iterator[Comparison]:
    """The comparison of each tensor of `a` and `b`, as soon as it is done.

    With `tolerance` 0 numbers are equal whose bits are; else floats also are equal where
    |a - b| <= tolerance * max(|a|, |b|). Raises CheckpointError as `check_comparable` does, and for
    what cannot be read.
    """
    check_comparable(a, b)
    done, total = 0, total_bytes(a, b)
    progress("", done, total)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, spec in a.tensors.items():
            how = method(spec, b.tensors[name])
            values, scales = ArrayDifference(), ArrayDifference()
            for ours, theirs in paired_blocks(a, b, name):
                values += _compare_values(pool, ours, theirs, how, tolerance)
                if how.dtype == INT8:
                    scales += array_difference(ours.scales, theirs.scales)
                done += ours.nbytes + theirs.nbytes
                progress(name, done, total)
            yield Comparison(spec, how, values, scales if how.dtype == INT8 else None)


def total_bytes(*sources: Source) -> int:
    """The bytes of all tensors of these sources."""
    return sum(spec.nbytes for source in sources for spec in source.tensors.values())


def paired_blocks(a: Source, b: Source, name: str) -> Iterator[tuple[BlockValues, BlockValues]]:
    """A tensor of two sources block by block, in C order; the next are read meanwhile."""
    spec = a.tensors[name]
    parts = [block for _, piece in layer_pieces(spec) for block in blocks(spec, piece)]
    with ThreadPoolExecutor(2) as pool:

        def read(part: Part) -> list[Future[BlockValues]]:
            return [pool.submit(_read, source, name, part) for source in (a, b)]

        coming = read(parts[0])
        for following in [*parts[1:], None]:
            ours, theirs = (block.result() for block in coming)
            coming = [] if following is None else read(following)
            yield ours, theirs


def _read(source: Source, name: str, part: Part) -> BlockValues:
    spec = source.tensors[name]
    col_dims = params.MATRICES[name].col_dims if name in params.MATRICES else 1
    columns = math.prod(part_shape(part)[-col_dims:])
    values = source.read(name, part).reshape(-1, columns)
    if spec.groups is None:
        return BlockValues(values, np.empty((0, columns), np.float32))
    scales = source.read_scales(name, scales_part(spec, part)).reshape(-1, columns)
    return BlockValues(values, scales)


def _compare_values(
    pool: Executor, ours: BlockValues, theirs: BlockValues, how: Method, tolerance: float
) -> ArrayDifference:
    def chunk(rows: tuple[int, int]) -> ArrayDifference:
        a, b = ours.rows(*rows, how.dtype), theirs.rows(*rows, how.dtype)
        found = array_difference(a, b, tolerance)
        if not how.quantization:
            return found
        w = (b if len(ours.scales) else a).reshape(-1).astype(FLOAT32, copy=False)
        return dataclasses.replace(found, value_squares=float(w @ w))

    return sum(pool.map(chunk, ours.chunks()), ArrayDifference())


def verify_checksums(
    source: Source, progress: Progress = lambda name, done, total: None
) -> Iterator[ChecksumResult]:
    """Each tensor of a checkpoint of ours against the checksums that its import kept.

    Raises CheckpointError where there are no checksums, and for what cannot be read.
    """
    if not (isinstance(source, OrbaxSource) and source.checksums):
        raise CheckpointError(
            f"{source.path}: keeps no checksums, as checkpoints from `grok import` do; name a "
            "second checkpoint to compare it with."
        )
    done, total = 0, total_bytes(source)
    progress("", done, total)
    with ThreadPoolExecutor(4) as pool:
        for name, spec in source.tensors.items():
            every = list(layer_pieces(spec))
            found = pool.map(lambda piece, spec=spec: piece_checksum(source, spec, piece[1]), every)
            differing = []
            for (layer, _), checksum in zip(every, found, strict=True):
                done += spec.nbytes // len(every)
                progress(name, done, total)
                if checksum != source.checksums.get((name, layer)):
                    differing.append(layer)
            yield ChecksumResult(spec, len(every), tuple(differing))
