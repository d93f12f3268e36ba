"""Compares two checkpoints tensor by tensor, of any formats and types. One matrix of each source is
compared, in chunks, while the next is read."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Generator, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np

from grok import storage
from grok.config import ModelConfig
from grok.config.load import flatten
from grok.config.model import HOW_IT_RUNS
from grok.errors import CheckpointError
from grok.weights.array_difference import ArrayDifference, array_difference
from grok.weights.detect import is_release, open_source
from grok.weights.source import (
    ByteCounter,
    OnProgress,
    Part,
    Source,
    TensorSpec,
    blocks,
    layer_pieces,
    no_progress,
    part_shape,
    scales_part,
)

# From fine to coarse.
FLOATS = tuple(np.dtype(kind) for kind in (np.float32, np.float16, ml_dtypes.bfloat16))
FLOAT32, INT8 = np.dtype(np.float32), np.dtype(np.int8)
# Values; a chunk and its intermediates should fit in a core's cache.
CHUNK_VALUES = 1 << 18

# Fields of a config without effect on the values that a model computes.
NO_EFFECT = ("context_length", *HOW_IT_RUNS)


@dataclasses.dataclass(frozen=True)
class Method:
    """The comparison of two tensors, both converted to `dtype` (int8: as stored, int8 or int4, with
    scales); `words` describe it, and `quantization` marks quantised values against floats."""

    dtype: np.dtype
    words: str
    quantization: bool = False


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One tensor of two sources; only quantised ones compared as stored have `scales`."""

    spec: TensorSpec
    method: Method
    values: ArrayDifference
    scales: ArrayDifference | None

    @property
    def equal(self) -> bool:
        """Returns True where nothing differs."""
        return not self.values.differing and not (self.scales and self.scales.differing)

    def farthest(self, of_scales: bool = False) -> tuple[int | None, tuple[int, ...]]:
        """Layer, and index in the other axes, of the largest difference."""
        difference = self.scales if of_scales else self.values
        assert difference is not None and difference.index is not None
        shape = self.spec.scales_shape if of_scales else self.spec.shape
        index = tuple(int(i) for i in np.unravel_index(difference.index, shape))
        return (index[0], index[1:]) if self.spec.param.is_stacked else (None, index)


@dataclasses.dataclass(frozen=True)
class BlockValues:
    """A part of a tensor, as stored: `values` (rows, columns), `scales` (groups, columns), with no
    groups for floats."""

    values: np.ndarray
    scales: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes

    def rows(self, start: int, stop: int, dtype: np.dtype) -> np.ndarray:
        """Some rows in `dtype`: a float type, or int8 for quantised values without scales."""
        values = self.values[start:stop]
        if dtype == INT8 or not len(self.scales):
            return values.astype(dtype, copy=False)
        groups = np.arange(start, stop) * len(self.scales) // len(self.values)
        scales = self.scales[groups[0] : groups[-1] + 1].astype(FLOAT32)
        if len(scales) > 1:
            scales = scales[groups - groups[0]]
        return (values.astype(FLOAT32) * scales).astype(dtype)


def open_both(
    a: str | os.PathLike[str], b: str | os.PathLike[str], config: ModelConfig | None = None
) -> tuple[Source, Source]:
    """The sources at two paths. A release tells only part of its config, so without `config` it is
    opened with the other's. Raises CheckpointError as `open_source` does."""
    listings = (storage.list_files(path, CheckpointError) for path in (a, b))
    a_is_release, b_is_release = map(is_release, listings)
    if config is None and a_is_release and not b_is_release:
        second = open_source(b)
        return open_source(a, second.config), second
    first = open_source(a, config)
    return first, open_source(b, first.config if b_is_release else config)


def _check_comparable(a: Source, b: Source) -> None:
    sides: list[dict[str, Any]] = [
        {n: spec.shape for n, spec in source.tensors.items()} for source in (a, b)
    ]
    key = next((name for name, shape in sides[0].items() if shape != sides[1].get(name)), None)
    if key is None:
        sides = [config_values(source.config) for source in (a, b)]
        key = differing_key(a.config, b.config)
    if key is not None:
        raise CheckpointError(
            f"{a.path} and {b.path} are of different models: {key} is {sides[0].get(key)} in the "
            f"first and {sides[1].get(key)} in the second."
        )


def config_values(config: ModelConfig) -> dict[str, Any]:
    """The values of a config by their dotted keys."""
    return dict(flatten(dataclasses.asdict(config)))


def differing_key(a: ModelConfig, b: ModelConfig) -> str | None:
    """The key of a value by which the two models compute different things, if there is one. Other
    programs' configs may have fewer digits, and round 1/sqrt(128) differently."""
    first, second = config_values(a), config_values(b)
    for key in (key for key in {**first, **second} if key not in NO_EFFECT):
        x, y = first.get(key), second.get(key)
        if isinstance(x, int | float) and isinstance(y, int | float):
            if not math.isclose(x, y, rel_tol=1e-6):
                return key
        elif x != y:
            return key
    return None


def choose_method(a: TensorSpec, b: TensorSpec) -> Method:
    """The method to compare two tensors: in the coarser type, int8 and int4 dequantised to the
    other's float; two of one type as stored, but with other groups of scales, and int8 with int4,
    exactly, in float32."""
    kinds = f"{a.dtype} with {b.dtype}"
    if a.groups is not None and (a.groups, a.dtype) == (b.groups, b.dtype):
        return Method(INT8, f"{kinds}: values (in steps) and scales, bit for bit")
    if a.groups is not None and b.groups is not None:
        where = " in other groups" if a.dtype == b.dtype else ""
        return Method(FLOAT32, f"{kinds}{where}: dequantised to float32")
    if a.groups is not None or b.groups is not None:
        dtype = b.dtype if a.groups is not None else a.dtype
        return Method(dtype, f"{kinds}: dequantised to {dtype}", quantization=True)
    if a.dtype == b.dtype:
        return Method(a.dtype, f"{kinds}: bit for bit")
    coarse = max(a.dtype, b.dtype, key=FLOATS.index)
    return Method(coarse, f"{kinds}: rounded to {coarse}")


def compare(
    a: Source, b: Source, tolerance: float = 0.0, on_progress: OnProgress = no_progress
) -> Iterator[Comparison]:
    """Yields the comparison of each tensor of `a` and `b`. Values are equal if their bits are; with
    a `tolerance`, floats also where |a - b| <= tolerance * max(|a|, |b|). Raises CheckpointError
    for different models, and for unreadable files."""
    _check_comparable(a, b)
    counter = ByteCounter(on_progress, a.nbytes + b.nbytes)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, spec in a.tensors.items():
            method = choose_method(spec, b.tensors[name])
            values, scales = ArrayDifference(), ArrayDifference()
            with contextlib.closing(paired_blocks(a, b, name)) as pairs:
                for ours, theirs in pairs:
                    values += _compare_values(pool, ours, theirs, method, tolerance)
                    if method.dtype == INT8:
                        scales += array_difference(ours.scales, theirs.scales)
                    counter.add(name, ours.nbytes + theirs.nbytes)
            yield Comparison(spec, method, values, scales if method.dtype == INT8 else None)


def paired_blocks(
    a: Source, b: Source, name: str
) -> Generator[tuple[BlockValues, BlockValues], None, None]:
    """Yields a tensor of two sources block by block, in C order, and reads the next meanwhile; to
    be closed where it is not used up."""
    spec = a.tensors[name]
    parts = [part for _, piece in layer_pieces(spec) for part in blocks(spec, piece)]
    with ThreadPoolExecutor(2) as pool:

        def read(part: Part) -> list[Future[BlockValues]]:
            return [pool.submit(_read, source, name, part) for source in (a, b)]

        futures = read(parts[0])
        for next_part in [*parts[1:], None]:
            ours, theirs = (future.result() for future in futures)
            futures = [] if next_part is None else read(next_part)
            yield ours, theirs


def _read(source: Source, name: str, part: Part) -> BlockValues:
    spec = source.tensors[name]
    col_dims = spec.param.output_dims if spec.param.is_matmul else 1
    columns = math.prod(part_shape(part)[-col_dims:])
    values = source.read(name, part).reshape(-1, columns)
    if spec.groups is None:
        return BlockValues(values, np.empty((0, columns), np.float32))
    scales = source.read_scales(name, scales_part(spec, part)).reshape(-1, columns)
    return BlockValues(values, scales)


def _compare_values(
    pool: Executor, ours: BlockValues, theirs: BlockValues, method: Method, tolerance: float
) -> ArrayDifference:
    rows, columns = ours.values.shape
    step = max(1, CHUNK_VALUES // columns)

    def chunk(start: int) -> ArrayDifference:
        stop = min(start + step, rows)
        a, b = (block.rows(start, stop, method.dtype) for block in (ours, theirs))
        difference = array_difference(a, b, tolerance)
        if not method.quantization:
            return difference
        w = (b if len(ours.scales) else a).reshape(-1).astype(FLOAT32, copy=False)
        return dataclasses.replace(difference, value_squares=float(w @ w))

    return sum(pool.map(chunk, range(0, rows, step)), ArrayDifference())
