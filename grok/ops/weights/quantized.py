"""int8 and int4 matrices with scales: values * scales, a scale for each column and group of rows.

A matrix (..., rows, columns) has int8 or int4 values and scales
(..., groups, columns); a group is rows/groups consecutive rows, the contracted axis. Rows or
columns may be several axes, as in (N, H, D). On devices two int4 values share a byte.

`quantize` and `dequantize` take NumPy or JAX arrays and give the same kind.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grok.ops.weights import weight
from grok.ops.weights.layer_slice import row_of


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scales", "layer"],
    meta_fields=["contract_dims", "output_dims"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """A matrix as int8 or int4 `values` (..., rows, columns) and `scales` (..., groups, columns).

    With `layer`, an index, both still have all layers in front, and the matrix is that layer's:
    taking one expert then reads no other, where a slice of the layer would copy them all.
    """

    values: Any  # jax.Array, or its shape and type
    scales: Any
    contract_dims: int = 1
    output_dims: int = 1
    layer: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return self.values.shape if self.layer is None else self.values.shape[1:]

    @property
    def num_scale_groups(self) -> int:
        """Number of groups of rows, each with a scale for every column."""
        return self.scales.shape[-1 - self.output_dims]

    def __getitem__(self, index) -> "QuantizedArray":
        """The matrix at `index` of the first of several leading axes."""
        at = index if self.layer is None else (self.layer, index)
        return dataclasses.replace(self, values=self.values[at], scales=self.scales[at], layer=None)

    def read_row(self, expert, d) -> jax.Array:
        """Row `d` of an expert's matrix, (1, columns) float32."""
        group = d // (self.shape[-2] // self.num_scale_groups)
        return row_of(self.values, self.layer, expert, d) * row_of(
            self.scales, self.layer, expert, group
        )

    def dequantize(self, dtype) -> jax.Array:
        """values * scales in `dtype`."""
        w = weight.materialize(self)
        return dequantize(w.values, w.scales, dtype, w.contract_dims, w.output_dims)


@weight.cast.register
def _(w: QuantizedArray, dtype):
    return w


@weight.take_layer.register
def _(w: QuantizedArray, layer):
    return dataclasses.replace(w, layer=layer)


@weight.materialize.register
def _(w: QuantizedArray):
    if w.layer is None:
        return w
    values, scales = (
        jax.lax.dynamic_index_in_dim(a, w.layer, keepdims=False) for a in (w.values, w.scales)
    )
    return dataclasses.replace(w, values=values, scales=scales, layer=None)


@weight.is_stacked.register
def _(w: QuantizedArray):
    return w.layer is not None


@weight.is_plain.register
def _(w: QuantizedArray):
    return False


@weight.leaf_axes.register
def _(w: QuantizedArray, axes):
    columns = len(axes) - w.output_dims
    rows = columns - w.contract_dims
    # Several groups of rows are split like the rows; a single one is on every device.
    group_axis = None if w.num_scale_groups == 1 else axes[rows]
    scale_axes = (*axes[:rows], group_axis, *axes[columns:])
    if w.layer is None:
        return axes, scale_axes
    return (None, *axes), (None, *scale_axes), ()  # and the index of the layer


@weight.take_expert.register
def _(w_EDF: QuantizedArray, expert, dtype):
    return w_EDF[expert].dequantize(dtype)


@weight.kernel_operands.register
def _(w_EDF: QuantizedArray):
    if w_EDF.layer is None:
        return 0, w_EDF.values[None], w_EDF.scales[None]
    return w_EDF.layer, w_EDF.values, w_EDF.scales


def dequantize(values, scales, dtype, contract_dims: int = 1, output_dims: int = 1):
    """values * scales, as `values` in shape; exact in float32, rounded once to another `dtype`.

    An int8 has 7 bits, an int4 3 and a bfloat16 scale 8: their product fits in float32's 24.
    """
    num_scale_groups = scales.shape[scales.ndim - output_dims - 1]
    split = _split(values.shape, num_scale_groups, contract_dims, output_dims)
    shape = (*split[: len(split) - output_dims - 1], 1, *split[len(split) - output_dims :])
    product = values.reshape(split).astype(np.float32) * scales.reshape(shape).astype(np.float32)
    return product.astype(dtype).reshape(values.shape)


def quantize(
    w, num_scale_groups: int, contract_dims: int = 1, output_dims: int = 1, dtype: Any = np.int8
):
    """Values in `dtype`, int8 or int4, and bfloat16 scales of a float matrix `w` (..., rows,
    columns).

    A scale is its group's largest magnitude / 127 (int4: 7), rounded; values are rounded to the
    nearest. A group of zeros has scale 0. Requantising a result of `dequantize`, in float32 or
    bfloat16, gives the same for every group whose largest has magnitude 127 or 7. (Where bfloat16
    rounded that largest product, the division may miss the scale by one unit in the last place; of
    the scale and its neighbours the one is taken that reproduces `w` exactly, if any does.)
    """
    xp = jnp if isinstance(w, jax.Array) else np
    split = _split(w.shape, num_scale_groups, contract_dims, output_dims)
    axis = len(split) - output_dims - 1
    w_split = w.reshape(split)
    largest = xp.max(xp.abs(w_split), axis=axis, keepdims=True).astype(np.float32)
    scales = (largest / np.float32(jnp.iinfo(dtype).max)).astype(jnp.bfloat16)
    values = _rounded(xp, w_split, scales, dtype)
    if w.dtype == jnp.bfloat16:
        is_exact = _reproduces(w_split, values, scales, axis)
        for step in (1, -1):
            bits = xp.maximum(scales.view(np.uint16).astype(np.int32) + step, 0)
            neighbour = bits.astype(np.uint16).view(jnp.bfloat16)
            new_values = _rounded(xp, w_split, neighbour, dtype)
            is_better = ~is_exact & _reproduces(w_split, new_values, neighbour, axis)
            scales = xp.where(is_better, neighbour, scales)
            values = xp.where(is_better, new_values, values)
            is_exact |= is_better
    return values.reshape(w.shape), scales.reshape((*split[:axis], *split[axis + 1 :]))


def _rounded(xp, w_split, scales, dtype):
    """The values in `dtype` nearest to w / scale."""
    divisor = scales.astype(np.float32)
    divisor = xp.where(divisor == 0, np.float32(1), divisor)
    quotient = w_split.astype(np.float32) / divisor
    largest = jnp.iinfo(dtype).max
    return xp.clip(xp.rint(quotient), -largest, largest).astype(dtype)


def _reproduces(w_split, values, scales, axis: int):
    """True where values * scale, rounded as w is, equal w in the whole group."""
    product = values.astype(np.float32) * scales.astype(np.float32)
    return (product.astype(w_split.dtype) == w_split).all(axis=axis, keepdims=True)


def _split(shape, num_scale_groups: int, contract_dims: int, output_dims: int) -> tuple[int, ...]:
    """`shape` with its rows as (groups, rows/groups)."""
    lead = shape[: len(shape) - contract_dims - output_dims]
    rows = math.prod(shape[len(lead) : len(shape) - output_dims])
    if num_scale_groups < 1 or rows % num_scale_groups:
        raise ValueError(f"{rows} rows cannot be split into {num_scale_groups} equal groups")
    return (*lead, num_scale_groups, rows // num_scale_groups, *shape[len(shape) - output_dims :])
