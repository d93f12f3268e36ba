"""Low-rank adaptation of frozen matrices (LoRA, Hu et al. 2021): W + alpha/rank * A B.

The product with A B is computed beside that with W, never in it: a bfloat16 W would round away
what small A B add to it, and the gradient of a sum of both would first be made as large as W.

W may be quantised (QLoRA, Dettmers et al. 2023): devices gather a layer's matrices as they are
stored, and make floats of them to multiply.

Letters as of the matrix: rows are its contracted axes, r is the rank.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from grok.ops.weights import weight
from grok.ops.weights.weight import dot


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["base", "a", "b"], meta_fields=["scale"]
)
@dataclasses.dataclass(frozen=True)
class LoraArray:
    """A frozen matrix `base` (..., rows, columns) and its adapter: `a` (..., rows, r) times `b`
    (..., r, columns) times `scale`. Rows or columns may be several axes, as in (N, H, D)."""

    base: Any  # jax.Array or QuantizedArray, or its shape and type
    a: Any
    b: Any
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return self.base.shape

    def __getitem__(self, index) -> "LoraArray":
        """The matrix at `index` of the first of several leading axes."""
        return dataclasses.replace(self, base=self.base[index], a=self.a[index], b=self.b[index])


@weight.cast.register
def _(w: LoraArray, dtype):
    # With the scale in `b`, as products take it.
    b = (w.b.astype(jnp.float32) * w.scale).astype(dtype)
    return LoraArray(weight.cast(w.base, dtype), w.a.astype(dtype), b)


@weight.take_layer.register
def _(w: LoraArray, layer):
    return jax.tree.map(lambda leaf: weight.take_layer(leaf, layer), w)


@weight.leaf_axes.register
def _(w: LoraArray, axes):
    *lead, row, column = axes
    return *weight.leaf_axes(w.base, axes), (*lead, row, None), (*lead, None, column)


@weight.base.register
def _(w: LoraArray):
    return w.base


@weight.adapter.register
def _(w: LoraArray):
    return w.a, w.b


@weight.is_plain.register
def _(w: LoraArray):
    return False


@weight.matmul.register
def _(w_DF: LoraArray, x_RD):
    return dot(x_RD, w_DF.base) + dot(dot(x_RD, w_DF.a).astype(x_RD.dtype), w_DF.b)


@weight.matmul_transposed.register
def _(w_DF: LoraArray, y_RF):
    return dot(y_RF, w_DF.base.T) + dot(dot(y_RF, w_DF.b.T).astype(y_RF.dtype), w_DF.a.T)


@weight.weight_gradient.register
def _(w_DF: LoraArray, x_RD, dy_RF):
    da_Dr = dot(x_RD.T, dot(dy_RF, w_DF.b.T).astype(x_RD.dtype))
    db_rF = dot(dot(x_RD, w_DF.a).astype(x_RD.dtype).T, dy_RF)
    return LoraArray(None, da_Dr, db_rF)


@weight.trainable_part.register
def _(w: LoraArray):
    return dataclasses.replace(w, base=None)


@weight.as_trained.register
def _(w: LoraArray):
    if weight.is_plain(w.base):
        return w
    return dataclasses.replace(w, base=w.base.dequantize(w.a.dtype))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base"], meta_fields=["dtype"])
@dataclasses.dataclass(frozen=True)
class FrozenArray:
    """A frozen quantised matrix without an adapter, of a model that trains others'; used in
    `dtype`, that of computation."""

    base: Any  # QuantizedArray, of arrays or of their shapes and types
    dtype: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return self.base.shape


@weight.cast.register
def _(w: FrozenArray, dtype):
    return dataclasses.replace(w, dtype=jnp.dtype(dtype))


@weight.leaf_axes.register
def _(w: FrozenArray, axes):
    return weight.leaf_axes(w.base, axes)


@weight.is_plain.register
def _(w: FrozenArray):
    return False


@weight.as_trained.register
def _(w: FrozenArray):
    return w.base.dequantize(w.dtype)


def merge_adapter(w: LoraArray, contract_dims: int, output_dims: int):
    """The matrix with its adapter added, float32; for NumPy and JAX arrays."""
    columns = len(w.shape) - output_dims
    lead = w.shape[: columns - contract_dims]
    rank = w.a.shape[-1]
    a = w.a.reshape(*lead, -1, rank).astype("float32")
    b = w.b.reshape(*lead, rank, math.prod(w.shape[columns:])).astype("float32")
    return w.base.astype("float32") + (w.scale * (a @ b)).reshape(w.shape)
