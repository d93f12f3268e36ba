"""int8 matrices with scales: values * scales, a scale for each column and group of rows.

This is the release's form. A matrix (..., rows, columns) has int8 values and scales
(..., groups, columns); a group is rows/groups consecutive rows, the contracted axis. Rows or
columns may be several axes, as in (N, H, D).

`quantize` and `dequantize` take NumPy or JAX arrays and give the same kind.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LARGEST = 127


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scales"],
    meta_fields=["row_dims", "col_dims"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """A matrix as int8 `values` (..., rows, columns) and `scales` (..., groups, columns)."""

    values: Any  # jax.Array, or its shape and type
    scales: Any
    row_dims: int = 1
    col_dims: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return self.values.shape

    def __getitem__(self, index) -> "QuantizedArray":
        """The matrix at `index` of the first of several leading axes."""
        return dataclasses.replace(self, values=self.values[index], scales=self.scales[index])

    def dequantize(self, dtype) -> jax.Array:
        """values * scales in `dtype`."""
        return dequantize(self.values, self.scales, dtype, self.row_dims, self.col_dims)


def dequantize(values, scales, dtype, row_dims: int = 1, col_dims: int = 1):
    """values * scales, as `values` in shape; exact in float32, rounded once to another `dtype`.

    An int8 has 7 bits and a bfloat16 scale 8: their product fits in float32's 24.
    """
    groups = scales.shape[scales.ndim - col_dims - 1]
    split = _split(values.shape, groups, row_dims, col_dims)
    shape = (*split[: len(split) - col_dims - 1], 1, *split[len(split) - col_dims :])
    product = values.reshape(split).astype(np.float32) * scales.reshape(shape).astype(np.float32)
    return product.astype(dtype).reshape(values.shape)


def quantize(w, groups: int, row_dims: int = 1, col_dims: int = 1, scale_dtype=jnp.bfloat16):
    """int8 values and scales of a float matrix `w` (..., rows, columns).

    A scale is its group's largest magnitude / 127, rounded to `scale_dtype`; values are rounded
    to the nearest. Requantising what `dequantize` gave, in float32 or bfloat16, gives the same
    values and scales back for every group whose largest value has magnitude 127. A group of zeros
    has scale 0.
    """
    xp = jnp if isinstance(w, jax.Array) else np
    split = _split(w.shape, groups, row_dims, col_dims)
    w_split = w.reshape(split).astype(np.float32)
    axis = len(split) - col_dims - 1
    largest = xp.max(xp.abs(w_split), axis=axis, keepdims=True)
    scales = (largest / np.float32(LARGEST)).astype(scale_dtype)
    divisor = scales.astype(np.float32)
    divisor = xp.where(divisor == 0, np.float32(1), divisor)
    values = xp.clip(xp.rint(w_split / divisor), -LARGEST, LARGEST).astype(np.int8)
    return values.reshape(w.shape), scales.reshape((*split[:axis], *split[axis + 1 :]))


def _split(shape, groups: int, row_dims: int, col_dims: int) -> tuple[int, ...]:
    """`shape` with its rows as (groups, rows/groups)."""
    lead = shape[: len(shape) - row_dims - col_dims]
    rows = math.prod(shape[len(lead) : len(shape) - col_dims])
    if groups < 1 or rows % groups:
        raise ValueError(f"{rows} rows cannot be split into {groups} equal groups")
    return (*lead, groups, rows // groups, *shape[len(shape) - col_dims :])
