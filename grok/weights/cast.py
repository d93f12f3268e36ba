"""Weights in another type than the stored one: sources that convert the parts that are read."""

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np

from grok.config import ModelConfig
from grok.config.model import QUANTIZED_DTYPES
from grok.errors import CheckpointError
from grok.model.param_spec import ParamSpec
from grok.model.params import param_specs
from grok.ops.weights.quantized import dequantize, quantize
from grok.weights.array_difference import ArrayDifference
from grok.weights.source import Source, TensorSpec, scales_part
from grok.weights.storage_layout import Part, StorageLayout

ScaleGroups = Callable[[ParamSpec], int]
# Threads quantise a matrix in stripes of columns of this size, which fits a core's cache.
STRIPE_BYTES = 1 << 21
# Rows that share a scale in a matrix of int4: as those of other 4-bit formats (AWQ, GPTQ).
INT4_GROUP = 128
THREADS = 8


def release_groups(spec: ParamSpec) -> int:
    """Groups of scales of a matrix in the release, which had row-parallel ones on eight devices."""
    return 8 if spec.is_row_parallel else 1


def per_channel(spec: ParamSpec) -> int:
    """One group of scales for each matrix: a scale for each of its columns."""
    return 1


def scale_groups(spec: ParamSpec, dtype: str, groups: ScaleGroups = release_groups) -> int:
    """Groups of scales of a matrix in a model of `dtype`: `groups` where it is int8; where it is
    int4, those of INT4_GROUP rows. Of numbers up to these the largest that divides its rows."""
    rows, is_int4 = spec.contract_size, spec.quantized_dtype(dtype) == "int4"
    most = max(1, rows // INT4_GROUP) if is_int4 else groups(spec)
    return max(count for count in range(1, most + 1) if rows % count == 0)


def quantized_groups(config: ModelConfig) -> dict[str, int]:
    """Groups of scales of each matrix, by name, of a quantised model that was made from floats."""
    matrices = (spec for spec in param_specs(config).values() if spec.is_matmul)
    return {spec.name: scale_groups(spec, config.param_dtype) for spec in matrices}


def converted(
    source: Source, dtype: str, groups: ScaleGroups = release_groups, measure: bool = False
) -> Source:
    """`source` with its matrices in `dtype`: "int4_all", "int4", "int8", "bfloat16" or "float32".
    All else is in the same float type, or beside quantised ones in float32. `groups` gives the
    number of row groups of a matrix that becomes int8, of which the largest that divides its rows
    is taken. Matrices that are of the type already stay as they are, bit for bit. With `measure`,
    what is quantised is a MeasuredQuantizedSource."""
    if dtype in QUANTIZED_DTYPES:
        quantized = MeasuredQuantizedSource if measure else QuantizedSource
        matrices = (spec for spec in source.tensors.values() if spec.param.is_matmul)
        if all(spec.dtype == spec.param.quantized_dtype(dtype) for spec in matrices):
            return source
        return quantized(source, groups, dtype)
    return FloatSource(source, np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype))


class FloatSource(Source):
    """A source with all its tensors in one float type."""

    def __init__(self, source: Source, dtype: np.dtype):
        self._source, self._dtype = source, dtype
        self.format, self.path, self.config = source.format, source.path, source.config
        self.tensors: dict[str, TensorSpec] = {
            name: TensorSpec(spec.param, dtype) for name, spec in source.tensors.items()
        }

    def read(self, name: str, part: Part) -> np.ndarray:
        """Values of a part; int8 or int4 times scale, exact in float32."""
        spec = self._source.tensors[name]
        values = self._source.read(name, part)
        if spec.groups is None:
            return values.astype(self._dtype, copy=False)
        return _dequantize_part(self._source, spec, part, values, self._dtype)

    def layout(self, name: str) -> StorageLayout:
        """That of the source; quantised values are multiplied by their scales in float32."""
        layout = self._source.layout(name)
        if self._source.tensors[name].groups is None:
            return layout
        return dataclasses.replace(layout, converted_itemsize=np.dtype(np.float32).itemsize)


class QuantizedSource(FloatSource):
    """A source with its matrices quantised and all else in float32. Matrices that are of their type
    already stay as they are."""

    def __init__(self, source: Source, groups: ScaleGroups = release_groups, dtype: str = "int8"):
        super().__init__(source, np.dtype(np.float32))
        for name, spec in source.tensors.items():
            if not spec.param.is_matmul:
                continue
            values = np.dtype(spec.param.quantized_dtype(dtype))
            count = scale_groups(spec.param, dtype, groups)
            is_stored = spec.dtype == values
            self.tensors[name] = spec if is_stored else TensorSpec(spec.param, values, count)

    def _is_stored(self, name: str) -> bool:
        return self.tensors[name] == self._source.tensors[name]

    def read(self, name: str, part: Part) -> np.ndarray:
        """Values of a part. Its columns are read with all their rows, since a scale needs them."""
        spec = self.tensors[name]
        if self._is_stored(name):
            return self._source.read(name, part)
        if spec.groups is None:
            return super().read(name, part)
        rows = spec.param.contract_axes
        lead, _, columns = spec.param.split(part)
        values, _ = self._quantize(name, (*lead, *spec.param.split(spec.full_part)[1], *columns))
        cut = tuple(part[axis] if axis in rows else slice(None) for axis in range(len(spec.shape)))
        return values[cut]

    def read_scales(self, name: str, part: Part) -> np.ndarray:
        """Scales of a part."""
        spec = self.tensors[name]
        if self._is_stored(name):
            return self._source.read_scales(name, part)
        at, rows = spec.param.lead_dims, spec.param.split(spec.full_part)[1]
        _, scales = self._quantize(name, (*part[:at], *rows, *part[at + 1 :]))
        return scales[(*(slice(None),) * at, part[at])]

    def read_quantized(self, name: str, part: Part) -> tuple[np.ndarray, np.ndarray]:
        """Values and scales of a part with all rows, which are read once."""
        if self._is_stored(name):
            return self._source.read_quantized(name, part)
        return self._quantize(name, part)

    def layout(self, name: str) -> StorageLayout:
        """That of the source; rows of a matrix that is quantised here, from float32, are never cut,
        since a scale needs all of them."""
        layout, spec = self._source.layout(name), self.tensors[name]
        if self._is_stored(name) or spec.groups is None:
            return layout
        rows, itemsize = tuple(spec.param.contract_axes), np.dtype(np.float32).itemsize
        return dataclasses.replace(layout, uncut=rows, converted_itemsize=itemsize)

    def scales_layout(self, name: str) -> StorageLayout:
        """That of the source, where the scales are its own."""
        if self._is_stored(name):
            return self._source.scales_layout(name)
        return super().scales_layout(name)

    def _quantize(self, name: str, part: Part) -> tuple[np.ndarray, np.ndarray]:
        values, stored = self._source.read(name, part), self._source.tensors[name]
        if stored.groups is not None:
            float32 = np.dtype(np.float32)
            values = _dequantize_part(self._source, stored, part, values, float32)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{self.path}: {name} has values that are not finite.")
        spec = self.tensors[name]
        assert spec.groups is not None
        row_dims, col_dims = spec.param.contract_dims, spec.param.output_dims
        return quantize(values, spec.groups, row_dims, col_dims, spec.dtype)


class MeasuredQuantizedSource(QuantizedSource):
    """A QuantizedSource to read every matrix of once, its values and then immediately its scales.
    `errors` holds the rounding error of what was read, by name and layer: its difference from the
    values before."""

    def __init__(self, source: Source, groups: ScaleGroups = release_groups, dtype: str = "int8"):
        super().__init__(source, groups, dtype)
        self.errors: dict[tuple[str, int | None], ArrayDifference] = {}
        self._lock = threading.Lock()
        # The same thread reads scales right after the values.
        self._last = threading.local()

    def _quantize(self, name: str, part: Part) -> tuple[np.ndarray, np.ndarray]:
        last, self._last.matrix = getattr(self._last, "matrix", None), None
        if last is not None and last[0] == (name, part):
            return last[1]
        quantized = self._measured(name, part)
        self._last.matrix = (name, part), quantized
        return quantized

    def _measured(self, name: str, part: Part) -> tuple[np.ndarray, np.ndarray]:
        matrix = _Matrix(self._source, name, part)
        w = matrix.values
        param, groups, dtype = (
            getattr(self.tensors[name], k) for k in ("param", "groups", "dtype")
        )
        assert groups is not None
        row_dims, col_dims = param.contract_dims, param.output_dims
        columns = w.ndim - col_dims
        values = np.empty(w.shape, dtype)
        lead, _, column_sizes = param.split(w.shape)
        scales = np.empty((*lead, groups, *column_sizes), ml_dtypes.bfloat16)
        width = max(1, STRIPE_BYTES * w.shape[columns] // (w.size * 4))

        def quantize_stripe(start: int) -> ArrayDifference:
            after = (slice(None),) * (col_dims - 1)
            cut: Any = (..., slice(start, start + width), *after)
            stripe = matrix.floats(cut)
            if not np.isfinite(stripe).all():
                raise CheckpointError(f"{self.path}: {name} has values that are not finite.")
            q, s = quantize(stripe, groups, row_dims, col_dims, dtype)
            values[cut], scales[cut] = q, s
            error = dequantize(q, s, np.float32, row_dims, col_dims)
            error -= stripe
            e, x = error.reshape(-1), stripe.reshape(-1)
            return ArrayDifference(
                largest_absolute=float(np.abs(e).max()),
                squares=float(e @ e),
                value_squares=float(x @ x),
                largest_value=float(np.abs(x).max()),
            )

        with ThreadPoolExecutor(THREADS) as pool:
            errors = pool.map(quantize_stripe, range(0, w.shape[columns], width))
            error = sum(errors, ArrayDifference())
        key = name, part[0].start
        with self._lock:
            self.errors[key] = self.errors.get(key, ArrayDifference()) + error
        return values, scales


class _Matrix:
    """Matrices of a source, all rows of a `part`, as they are stored: `values`, and the scales."""

    def __init__(self, source: Source, name: str, part: Part):
        self._spec = spec = source.tensors[name]
        self.values, self._scales = source.read(name, part), None
        if spec.groups is not None:
            self._scales = source.read_scales(name, scales_part(spec, part))

    def floats(self, cut: Any) -> np.ndarray:
        """Some columns in float32, a new array."""
        if self._scales is None:
            return self.values[cut].astype(np.float32)
        rows, columns = self._spec.param.contract_dims, self._spec.param.output_dims
        return dequantize(self.values[cut], self._scales[cut], np.float32, rows, columns)


def _dequantize_part(
    source: Source, spec: TensorSpec, part: Part, values: np.ndarray, dtype: np.dtype
) -> np.ndarray:
    """Values times the scales of their rows, for any part of a matrix."""
    param = spec.param
    assert spec.groups is not None
    lead, row_part, columns = param.split(part)
    row_sizes = param.split(param.shape)[1]
    group_rows = param.contract_size // spec.groups
    # The index of every row, and the groups of the first and the last of them.
    numbers = np.arange(param.contract_size).reshape(row_sizes)[row_part]
    first, last = numbers.min() // group_rows, numbers.max() // group_rows
    scales = source.read_scales(spec.name, (*lead, slice(int(first), int(last) + 1), *columns))
    if numbers.size != (last + 1 - first) * group_rows:
        # Rows that begin or end inside a group: each row gets its own scale.
        scales = np.take(scales, numbers.reshape(-1) // group_rows - first, axis=len(lead))
    return dequantize(values, scales, dtype, param.contract_dims, param.output_dims)
