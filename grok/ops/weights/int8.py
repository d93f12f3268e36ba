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
    data_fields=["values", "scales", "layer"],
    meta_fields=["row_dims", "col_dims"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """A matrix as int8 `values` (..., rows, columns) and `scales` (..., groups, columns).

    With `layer`, a number, both still have all layers in front, and the matrix is that layer's:
    what then takes one expert reads no other, where a slice of the layer would copy them all.
    """

    values: Any  # jax.Array, or its shape and type
    scales: Any
    row_dims: int = 1
    col_dims: int = 1
    layer: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return self.values.shape if self.layer is None else self.values.shape[1:]

    @property
    def groups(self) -> int:
        """Groups of rows, each with a scale for every column."""
        return self.scales.shape[-1 - self.col_dims]

    def __getitem__(self, index) -> "QuantizedArray":
        """The matrix at `index` of the first of several leading axes."""
        at = index if self.layer is None else (self.layer, index)
        return dataclasses.replace(self, values=self.values[at], scales=self.scales[at], layer=None)

    def sliced(self) -> "QuantizedArray":
        """The same with the other layers left behind."""
        if self.layer is None:
            return self
        values, scales = (
            jax.lax.dynamic_index_in_dim(a, self.layer, keepdims=False)
            for a in (self.values, self.scales)
        )
        return dataclasses.replace(self, values=values, scales=scales, layer=None)

    def dequantize(self, dtype) -> jax.Array:
        """values * scales in `dtype`."""
        w = self.sliced()
        return dequantize(w.values, w.scales, dtype, w.row_dims, w.col_dims)


def dequantize(values, scales, dtype, row_dims: int = 1, col_dims: int = 1):
    """values * scales, as `values` in shape; exact in float32, rounded once to another `dtype`.

    An int8 has 7 bits and a bfloat16 scale 8: their product fits in float32's 24.
    """
    groups = scales.shape[scales.ndim - col_dims - 1]
    split = _split(values.shape, groups, row_dims, col_dims)
    shape = (*split[: len(split) - col_dims - 1], 1, *split[len(split) - col_dims :])
    product = values.reshape(split).astype(np.float32) * scales.reshape(shape).astype(np.float32)
    return product.astype(dtype).reshape(values.shape)


def quantize(w, groups: int, row_dims: int = 1, col_dims: int = 1):
    """int8 values and bfloat16 scales of a float matrix `w` (..., rows, columns).

    A scale is its group's largest magnitude / 127, rounded; values are rounded to the nearest. A
    group of zeros has scale 0. Requantising what `dequantize` gave, in float32 or bfloat16, gives
    the same values back for every group whose largest one has magnitude 127. (Where bfloat16
    rounded that largest product, the division may miss the scale by one place; of the scale and
    its neighbours that one is taken which gives `w` back exactly, if any does.)
    """
    xp = jnp if isinstance(w, jax.Array) else np
    split = _split(w.shape, groups, row_dims, col_dims)
    axis = len(split) - col_dims - 1
    w_split = w.reshape(split)
    largest = xp.max(xp.abs(w_split), axis=axis, keepdims=True).astype(np.float32)
    scales = (largest / np.float32(LARGEST)).astype(jnp.bfloat16)
    values = _rounded(xp, w_split, scales)
    if w.dtype == jnp.bfloat16:
        found = _gives_back(w_split, values, scales, axis)
        for step in (1, -1):
            place = xp.maximum(scales.view(np.uint16).astype(np.int32) + step, 0)
            near = place.astype(np.uint16).view(jnp.bfloat16)
            near_values = _rounded(xp, w_split, near)
            better = ~found & _gives_back(w_split, near_values, near, axis)
            scales, values = xp.where(better, near, scales), xp.where(better, near_values, values)
            found |= better
    return values.reshape(w.shape), scales.reshape((*split[:axis], *split[axis + 1 :]))


def _rounded(xp, w_split, scales):
    """The int8 values nearest to w / scale."""
    divisor = scales.astype(np.float32)
    divisor = xp.where(divisor == 0, np.float32(1), divisor)
    quotient = w_split.astype(np.float32) / divisor
    return xp.clip(xp.rint(quotient), -LARGEST, LARGEST).astype(np.int8)


def _gives_back(w_split, values, scales, axis: int):
    """Whether values * scale, rounded as w is, are w in the whole group."""
    product = values.astype(np.float32) * scales.astype(np.float32)
    return (product.astype(w_split.dtype) == w_split).all(axis=axis, keepdims=True)


def _split(shape, groups: int, row_dims: int, col_dims: int) -> tuple[int, ...]:
    """`shape` with its rows as (groups, rows/groups)."""
    lead = shape[: len(shape) - row_dims - col_dims]
    rows = math.prod(shape[len(lead) : len(shape) - col_dims])
    if groups < 1 or rows % groups:
        raise ValueError(f"{rows} rows cannot be split into {groups} equal groups")
    return (*lead, groups, rows // groups, *shape[len(shape) - col_dims :])
