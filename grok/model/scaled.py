"""Products in 8 bits of weights that are sharded over a mesh: floats are quantised as stored, to
train; int8 and int4 serve as they are. They travel so, as does what is gathered of the tokens.

Letters: B batch, T length, R = B*T rows, K contracted axis, N columns, E experts, D embed.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from grok import sharding
from grok.config import ModelConfig
from grok.hardware import LANES
from grok.ops.moe.experts_int8 import experts_int8
from grok.ops.moe.experts_scaled import Options, ScaledRows, experts_scaled
from grok.ops.moe.tiling import mlp_splits
from grok.ops.scaled import FORMATS, Scaled, quantize, quantize_by, scaled_dot, scaled_product
from grok.ops.varying import pvary, pvary_over
from grok.ops.weights.quantized import QuantizedArray
from grok.ops.weights.weight import as_one_expert, leaf_axes

TOKENS_PER_SCALE = 8192  # an int32 holds the sum of the products of some 16 times as many


def quantized_matrix(w: jax.Array, axes: sharding.Axes, dims: tuple[int, ...], dtype) -> Scaled:
    """The matrix of which `w` is this device's shard, stored in `axes`, in 8 bits; with scales
    along `dims` over all shards, of a shape without these. Inside `shard_map`."""
    w = w.astype(jnp.float32)
    magnitude = jnp.max(jnp.abs(w), axis=dims, keepdims=True)
    for dim in dims:
        magnitude = sharding.pmax(magnitude, axes[dim])
    scaled = quantize_by(w, magnitude, dtype)
    others = tuple(axis for dim, axis in enumerate(axes) if dim not in dims)
    scales = sharding.unshard_local(scaled.scales.squeeze(dims), others)
    return Scaled(sharding.unshard_local(scaled.values, axes), scales)


def experts_in_8_bits(rows, leaves, unshard, config: ModelConfig, activation: str) -> jax.Array:
    """y_RD of rows (ScaledRows, topk_weights_RC, expert_ids_RC), by this device's slice of the
    experts' width; `unshard` makes the matrices of their `leaves`."""
    if config.is_quantized:
        x, topk_weights_RC, expert_ids_RC = rows
        assignment = topk_weights_RC, expert_ids_RC
        gate, up, down = jax.tree.map(pvary, unshard(leaves))
        return experts_int8(x, *assignment, gate, up, down, activation=activation)
    splits = mlp_splits(leaves[0].shape[-1], LANES)
    column_major = sharding.axis_size("fsdp_embed") > 1
    options = Options(config.matmul_dtype, splits, activation, column_major)
    return experts_scaled(*rows, tuple(map(pvary, leaves)), unshard, options)


def mlp_in_8_bits(
    x: ScaledRows, leaves, unshard, config: ModelConfig, activation: str
) -> jax.Array:
    """y_RD of the dense MLP, which is one expert, to which every row goes."""
    R = len(x.values)
    assignment = pvary(jnp.ones((R, 1), jnp.float32)), pvary(jnp.zeros((R, 1), jnp.int32))
    if config.is_quantized:
        gate, up, down = map(as_one_expert, jax.tree.map(pvary, unshard(leaves)))
        return experts_int8(x, *assignment, gate, up, down, activation=activation)
    unshard = dataclasses.replace(unshard, axes=tuple((None, *axes) for axes in unshard.axes))
    matrices_E = [leaf[None] for leaf in leaves]
    return experts_in_8_bits((x, *assignment), matrices_E, unshard, config, activation)


class Projection(NamedTuple):
    """A matrix of which the first `contract_dims` axes are contracted, stored in `axes`."""

    axes: sharding.Axes
    contract_dims: int
    matmul_dtype: str

    @property
    def rows(self) -> tuple[int, ...]:
        """Dimensions that a product sums over."""
        return tuple(range(self.contract_dims))

    @property
    def columns(self) -> tuple[int, ...]:
        """Dimensions of the result."""
        return tuple(range(self.contract_dims, len(self.axes)))

    @property
    def used_axes(self) -> sharding.Axes:
        """Logical axes of the matrix as it is multiplied."""
        return sharding.unsharded_axes(self.axes)


def projection(x: jax.Array, w: jax.Array, matrix: Projection) -> jax.Array:
    """x (B, T, rows) times w (rows, columns) in 8 bits, in the type of x; all split as the matrix
    is used, and its stored shards the type of their gradient."""
    row_axes = matrix.used_axes[: matrix.contract_dims]
    column_axes = matrix.used_axes[matrix.contract_dims :]
    tokens = ("batch", "length")

    def local(x, w):
        # Where columns are split, each device has a part of the gradient of x.
        names = [name for axis in ("batch", *column_axes) for name in sharding.axis_names(axis)]
        batch = sharding.axis_names("batch")
        y = _product(pvary_over(x, tuple(names)), pvary_over(w, batch), matrix)
        for axis in row_axes:
            y = sharding.psum(y, axis) if axis else y
        return y

    sharded = sharding.shard_map(
        local, ((*tokens, *row_axes), matrix.axes), (*tokens, *column_axes)
    )
    return sharded(sharding.constrain(x, *tokens, *row_axes), w)


def projection_of_quantized(x: jax.Array, w: QuantizedArray, matrix: Projection) -> jax.Array:
    """As `projection`, of a matrix that is stored in int8, without gradients."""
    row_axes = matrix.used_axes[: matrix.contract_dims]
    column_axes = matrix.used_axes[matrix.contract_dims :]
    w_axes, tokens = leaf_axes(w, matrix.axes), ("batch", "length")

    def local(x, *leaves):
        rows = _quantize_rows(_as_matrix(x, 2), matrix, matrix.rows, jnp.int8)
        values, scales = map(sharding.unshard_local, leaves, w_axes)
        columns = Scaled(_as_matrix(values, matrix.contract_dims), _as_matrix(scales, 1))
        y_RN = scaled_product(rows, columns).astype(x.dtype)
        y = y_RN.reshape(*x.shape[:2], *scales.shape[1:])
        for axis in row_axes:
            y = sharding.psum(y, axis) if axis else y
        return y

    sharded = sharding.shard_map(local, ((*tokens, *row_axes), *w_axes), (*tokens, *column_axes))
    return sharded(sharding.constrain(x, *tokens, *row_axes), w.values, w.scales)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, w: jax.Array, matrix: Projection) -> jax.Array:
    """The product of one device's rows with `w` unsharded, or its slice of that."""
    formats = FORMATS[matrix.matmul_dtype]
    rows = _quantize_rows(_as_matrix(x, 2), matrix, matrix.rows, formats.values)
    scaled = quantized_matrix(w, matrix.axes, matrix.rows, formats.values)
    w_KN = _as_matrix(scaled.values, matrix.contract_dims)
    y_RN = scaled_dot(rows.values, w_KN) * rows.scales * scaled.scales.reshape(1, -1)
    return y_RN.reshape(*x.shape[:2], *scaled.scales.shape).astype(x.dtype)


def _backward(matrix: Projection, residuals, dy):
    """Gradients of the rows and of the shard, with scales along what each sums over."""
    x, w = residuals
    formats, dy_RN = FORMATS[matrix.matmul_dtype], _as_matrix(dy, 2)
    rows = _quantize_rows(dy_RN, matrix, matrix.columns, formats.gradients)
    scaled = quantized_matrix(w, matrix.axes, matrix.columns, formats.values)
    w_KN = _as_matrix(scaled.values, matrix.contract_dims)
    dx_RK = scaled_dot(rows.values, w_KN, 1, 1) * rows.scales * scaled.scales.reshape(1, -1)
    dw_KN = _weight_gradient(_as_matrix(x, 2), dy_RN, matrix)
    _, pull = jax.vjp(lambda w: sharding.unshard_local(w, matrix.axes), w)
    (dw,) = pull(dw_KN.reshape(scaled.values.shape).astype(w.dtype))
    return dx_RK.reshape(x.shape).astype(x.dtype), dw


_product.defvjp(lambda x, w, matrix: (_product(x, w, matrix), (x, w)), _backward)


def _weight_gradient(x_RK, dy_RN, matrix: Projection) -> jax.Array:
    """Sum over rows of x^T dy, float32, with scales for each column and TOKENS_PER_SCALE rows."""
    formats, dw_KN = FORMATS[matrix.matmul_dtype], jnp.zeros((), jnp.float32)
    for start in range(0, len(x_RK), TOKENS_PER_SCALE):
        rows = slice(start, start + TOKENS_PER_SCALE)
        x, dy = quantize(x_RK[rows], 0, formats.values), quantize(dy_RN[rows], 0, formats.gradients)
        dw_KN += scaled_dot(x.values, dy.values, 0, 0) * x.scales.reshape(-1, 1) * dy.scales
    return dw_KN


def _quantize_rows(x_RK, matrix: Projection, dims: tuple[int, ...], dtype) -> Scaled:
    """Rows with a scale each, over all devices that have a part of them."""
    x_RK = x_RK.astype(jnp.float32)
    magnitude_R1 = jnp.max(jnp.abs(x_RK), axis=1, keepdims=True)
    for dim in dims:
        magnitude_R1 = sharding.pmax(magnitude_R1, matrix.used_axes[dim])
    return quantize_by(x_RK, magnitude_R1, dtype)


def _as_matrix(a: jax.Array, rows: int) -> jax.Array:
    """`a` with its first `rows` axes as one, and the others."""
    return a.reshape(math.prod(a.shape[:rows]), -1)
