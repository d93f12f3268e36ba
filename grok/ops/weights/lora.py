"""Low-rank adaptation of frozen matrices (LoRA, Hu et al. 2021): W + alpha/rank * A B.

The product with A B is computed beside that with W, never in it: a bfloat16 W would round away
what small A B add to it, and the gradient of a sum of both would first be made as large as W.

Letters as of the matrix: rows are its contracted axes, r is the rank.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["base", "a", "b"], meta_fields=["scale"]
)
@dataclasses.dataclass(frozen=True)
class LoraArray:
    """A frozen matrix `base` (..., rows, columns) and its adapter: `a` (..., rows, r) times `b`
    (..., r, columns) times `scale`. Rows or columns may be several axes, as in (N, H, D)."""

    base: Any  # jax.Array, or its shape and type
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

    def scaled(self, dtype) -> "LoraArray":
        """The same in `dtype`, with the scale in `b`, as products take it."""
        b = (self.b.astype(jnp.float32) * self.scale).astype(dtype)
        return LoraArray(self.base.astype(dtype), self.a.astype(dtype), b)


def matmul(x_RD: jax.Array, w_DF: Any) -> jax.Array:
    """x w, summed in float32; `w` an array or a scaled LoraArray."""
    if not isinstance(w_DF, LoraArray):
        return _dot(x_RD, w_DF)
    return _dot(x_RD, w_DF.base) + _dot(_dot(x_RD, w_DF.a).astype(x_RD.dtype), w_DF.b)


def matmul_transposed(y_RF: jax.Array, w_DF: Any) -> jax.Array:
    """y w^T, summed in float32."""
    if not isinstance(w_DF, LoraArray):
        return _dot(y_RF, w_DF.T)
    return _dot(y_RF, w_DF.base.T) + _dot(_dot(y_RF, w_DF.b.T).astype(y_RF.dtype), w_DF.a.T)


def weight_gradient(x_RD: jax.Array, dy_RF: jax.Array, w_DF: Any) -> Any:
    """Gradient of <dy, x w> in float32, as `w` in structure; a LoraArray's base has none."""
    if not isinstance(w_DF, LoraArray):
        return _dot(x_RD.T, dy_RF)
    da_Dr = _dot(x_RD.T, _dot(dy_RF, w_DF.b.T).astype(x_RD.dtype))
    db_rF = _dot(_dot(x_RD, w_DF.a).astype(x_RD.dtype).T, dy_RF)
    return LoraArray(None, da_Dr, db_rF)


def trainable_part(w: Any) -> Any:
    """The part of a weight that has a gradient, as in the result of `weight_gradient`."""
    return dataclasses.replace(w, base=None) if isinstance(w, LoraArray) else w


def factor_shapes(
    shape: tuple[int, ...], contract_dims: int, output_dims: int, rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of `a` and `b` for a matrix of this shape."""
    columns = len(shape) - output_dims
    rows = columns - contract_dims
    return (*shape[:columns], rank), (*shape[:rows], rank, *shape[columns:])


def merge_adapter(w: LoraArray, contract_dims: int, output_dims: int):
    """The matrix with its adapter added, float32; for NumPy and JAX arrays."""
    columns = len(w.shape) - output_dims
    lead = w.shape[: columns - contract_dims]
    rank = w.a.shape[-1]
    a = w.a.reshape(*lead, -1, rank).astype("float32")
    b = w.b.reshape(*lead, rank, math.prod(w.shape[columns:])).astype("float32")
    return w.base.astype("float32") + (w.scale * (a @ b)).reshape(w.shape)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b, summed in float32."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
