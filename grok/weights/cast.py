"""Weights in another type than the stored one: sources that convert the parts that are read."""

from collections.abc import Callable

import ml_dtypes
import numpy as np

from grok.errors import CheckpointError
from grok.model.param_spec import ParamSpec
from grok.ops.weights.int8 import dequantize, quantize
from grok.weights.source import Part, Source, TensorSpec

ScaleGroups = Callable[[ParamSpec], int]


def release_groups(spec: ParamSpec) -> int:
    """Groups of scales of a matrix in the release, which had row-parallel ones on eight devices."""
    return 8 if spec.is_row_parallel else 1


def per_channel(spec: ParamSpec) -> int:
    """One group of scales for each matrix: a scale for each of its columns."""
    return 1


def converted(source: Source, dtype: str, groups: ScaleGroups = release_groups) -> Source:
    """`source` with its matrices in `dtype`: "int8", "bfloat16" or "float32".

    All else is in the same float type, or beside int8 in float32. `groups` gives the number of row
    groups of a matrix that becomes int8, of which the largest that divides its rows is taken.
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
            name: TensorSpec(spec.param, dtype) for name, spec in source.tensors.items()
        }

    def read(self, name: str, part: Part) -> np.ndarray:
        """Values of a part; int8 times scale, exact in float32."""
        spec = self._source.tensors[name]
        values = self._source.read(name, part)
        if spec.groups is None:
            return values.astype(self._dtype, copy=False)
        return _dequantize_part(self._source, spec, part, values, self._dtype)


class QuantizedSource(Source):
    """A source of floats with its matrices as int8 and all else in float32."""

    def __init__(self, source: Source, groups: ScaleGroups = release_groups):
        self._source = source
        self.format, self.path, self.config = source.format, source.path, source.config
        self.tensors = {}
        for name, spec in source.tensors.items():
            if spec.param.is_matmul:
                rows = spec.param.contract_size
                count = max(g for g in range(1, groups(spec.param) + 1) if rows % g == 0)
                self.tensors[name] = TensorSpec(spec.param, np.dtype(np.int8), count)
            else:
                self.tensors[name] = TensorSpec(spec.param, np.dtype(np.float32))

    def read(self, name: str, part: Part) -> np.ndarray:
        """Values of a part. Its columns are read with all their rows, since a scale needs them."""
        spec = self.tensors[name]
        if spec.groups is None:
            return self._source.read(name, part).astype(np.float32, copy=False)
        rows = spec.param.contract_axes
        lead, _, columns = spec.param.split(part)
        values, _ = self._quantize(name, (*lead, *spec.param.split(spec.full_part)[1], *columns))
        cut = tuple(part[axis] if axis in rows else slice(None) for axis in range(len(spec.shape)))
        return values[cut]

    def read_scales(self, name: str, part: Part) -> np.ndarray:
        """Scales of a part."""
        spec = self.tensors[name]
        at, rows = spec.param.lead_dims, spec.param.split(spec.full_part)[1]
        _, scales = self._quantize(name, (*part[:at], *rows, *part[at + 1 :]))
        return scales[(*(slice(None),) * at, part[at])]

    def _quantize(self, name: str, part: Part) -> tuple[np.ndarray, np.ndarray]:
        values = self._source.read(name, part)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{self.path}: {name} has values that are not finite.")
        spec = self.tensors[name]
        assert spec.groups is not None
        return quantize(values, spec.groups, spec.param.contract_dims, spec.param.output_dims)


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
