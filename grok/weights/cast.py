"""Weights in another type than the stored one, converted while they are read.

int8 -> float multiplies by the scales; float -> int8 quantises with the release's granularity;
float -> float rounds. Each is a `Source` around another and converts only the parts that are read.
"""

import math

import ml_dtypes
import numpy as np

from grok.errors import CheckpointError
from grok.model import params
from grok.ops.weights.int8 import dequantize, quantize
from grok.weights.source import Part, Source, TensorSpec

# Groups of rows in the release: two kinds of matrix were split by rows over eight devices.
RELEASE_GROUPS = {"layers/attention/w_out_NHD": 8, "layers/moe/w_down_EFD": 8}
PER_CHANNEL: dict[str, int] = {}


def converted(source: Source, dtype: str, groups: dict[str, int] | None = None) -> Source:
    """`source` with its matrices in `dtype`: "int8", "bfloat16" or "float32".

    With float types all other tensors are in `dtype` too; with int8 they stay float32, as in the
    release. `groups` has the number of row groups by matrix for floats that become int8, 1 for the
    others; by default the release's eight for w_out and w_down. A matrix whose rows it does not
    divide gets the largest smaller number that does.
    """
    if dtype == "int8":
        return source if source.dtype == "int8" else QuantizedSource(source, groups)
    return FloatSource(source, np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype))


class FloatSource(Source):
    """A source with all its tensors in one float type."""

    def __init__(self, source: Source, dtype: np.dtype):
        self._source, self._dtype = source, dtype
        self.format, self.path, self.config = source.format, source.path, source.config
        self.stores_rows = source.stores_rows
        self.tensors = {
            name: TensorSpec(name, spec.shape, dtype) for name, spec in source.tensors.items()
        }

    def read(self, name: str, part: Part) -> np.ndarray:
        """Values of a part; int8 times scale, exact in float32."""
        spec = self._source.tensors[name]
        values = self._source.read(name, part)
        if spec.groups is None:
            return values.astype(self._dtype, copy=False)
        return _dequantize_part(self._source, spec, part, values, self._dtype)

    def read_scales(self, name: str, part: Part) -> np.ndarray:
        """A float tensor has none."""
        raise AssertionError(f"{name} is {self._dtype} and has no scales")


class QuantizedSource(Source):
    """A source of floats with its matrices as int8 and all else in float32."""

    def __init__(self, source: Source, groups: dict[str, int] | None = None):
        self._source = source
        self.format, self.path, self.config = source.format, source.path, source.config
        groups = RELEASE_GROUPS if groups is None else groups
        self.tensors = {}
        for name, spec in source.tensors.items():
            if name in params.MATRICES:
                rows = math.prod(params.rows_and_columns(name, spec.shape)[1])
                count = max(g for g in range(1, groups.get(name, 1) + 1) if rows % g == 0)
                self.tensors[name] = TensorSpec(name, spec.shape, np.dtype(np.int8), count)
            else:
                self.tensors[name] = TensorSpec(name, spec.shape, np.dtype(np.float32))

    def read(self, name: str, part: Part) -> np.ndarray:
        """Values of a part. Its columns are read with all their rows, since a scale needs them."""
        spec = self.tensors[name]
        if spec.groups is None:
            return self._source.read(name, part).astype(np.float32, copy=False)
        rows = _row_axes(spec)
        values, _ = self._quantize(name, _all_rows(spec, part))
        cut = tuple(part[axis] if axis in rows else slice(None) for axis in range(len(spec.shape)))
        return values[cut]

    def read_scales(self, name: str, part: Part) -> np.ndarray:
        """Scales of a part."""
        spec = self.tensors[name]
        matrix = params.MATRICES[name]
        at = len(part) - matrix.col_dims - 1
        every = (slice(0, n) for n in params.rows_and_columns(name, spec.shape)[1])
        _, scales = self._quantize(name, (*part[:at], *every, *part[at + 1 :]))
        return scales[(*(slice(None),) * at, part[at])]

    def _quantize(self, name: str, part: Part) -> tuple[np.ndarray, np.ndarray]:
        values = self._source.read(name, part)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{self.path}: {name} has values that are not finite.")
        matrix, groups = params.MATRICES[name], self.tensors[name].groups
        assert groups is not None
        return quantize(values, groups, matrix.row_dims, matrix.col_dims)


def _row_axes(spec: TensorSpec) -> range:
    matrix = params.MATRICES[spec.name]
    stop = len(spec.shape) - matrix.col_dims
    return range(stop - matrix.row_dims, stop)


def _all_rows(spec: TensorSpec, part: Part) -> Part:
    rows = _row_axes(spec)
    return tuple(
        slice(0, spec.shape[axis]) if axis in rows else part[axis] for axis in range(len(part))
    )


def _dequantize_part(
    source: Source, spec: TensorSpec, part: Part, values: np.ndarray, dtype: np.dtype
) -> np.ndarray:
    """Values times the scales of their rows, for any part of a matrix."""
    matrix = params.MATRICES[spec.name]
    assert spec.groups is not None
    lead, rows, _ = params.rows_and_columns(spec.name, spec.shape)
    axes = _row_axes(spec)
    row_part = [part[axis] for axis in axes]
    group_rows = math.prod(rows) // spec.groups
    # The index of every row, and the groups of the first and the last of them.
    numbers = np.arange(math.prod(rows)).reshape(rows)[tuple(row_part)]
    first, last = numbers.min() // group_rows, numbers.max() // group_rows
    scale_part = (*part[: len(lead)], slice(int(first), int(last) + 1), *part[axes.stop :])
    scales = source.read_scales(spec.name, scale_part)
    if numbers.size == (last + 1 - first) * group_rows:
        return dequantize(values, scales, dtype, matrix.row_dims, matrix.col_dims)
    # Rows that begin or end inside a group: each row gets its own scale.
    row_scales = np.take(scales, numbers.reshape(-1) // group_rows - first, axis=len(lead))
    return dequantize(values, row_scales, dtype, matrix.row_dims, matrix.col_dims)
