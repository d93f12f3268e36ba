"""8-bit values with scales, made of floats as these are multiplied: int8, or float8 as e4m3, and as
e5m2 for gradients.

A scale is the largest magnitude of what it belongs to over the largest value of the type: of a row,
of a column, or of a group of consecutive columns of a row, always along what a product sums over.
Rounding is to the nearest, so that the same numbers give the same values. Letters: M rows, K
contracted axis, N columns, G groups of K.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grok import hardware
from grok.ops.float8 import from_float8, is_float8, to_float8
from grok.ops.weights.weight import kernel_operands

MIN_MAGNITUDE = 1e-30  # below it, values are zeros
MAX_GROUP_COLUMNS, GROUP_MULTIPLE = 1024, 128
EXACT_PRODUCTS = 1024  # of int8 values, whose sum a float32 holds: 1024 * 127^2 < 2^24


class MatmulFormat(NamedTuple):
    """Types of the operands of products."""

    values: Any  # of activations and weights
    gradients: Any


FORMATS = {
    "int8": MatmulFormat(jnp.int8, jnp.int8),
    "float8": MatmulFormat(jnp.float8_e4m3fn, jnp.float8_e5m2),
}


class Scaled(NamedTuple):
    """`values` in 8 bits and float32 `scales`, whose product is the array."""

    values: jax.Array
    scales: Any  # jax.Array; None where they are folded into what is multiplied by the values


@kernel_operands.register
def _(w_EKN: Scaled):
    return 0, w_EKN.values[None], w_EKN.scales[None, :, None, :]


def max_value(dtype) -> float:
    """The largest finite value of an 8-bit type."""
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    return float(jnp.iinfo(dtype).max if is_integer else jnp.finfo(dtype).max)


def quantize(x: jax.Array, axis: int, dtype) -> Scaled:
    """`x` with one scale along `axis`, which stays as an axis of one."""
    x = x.astype(jnp.float32)
    return quantize_by(x, jnp.max(jnp.abs(x), axis=axis, keepdims=True), dtype)


def quantize_by(x: jax.Array, magnitude: jax.Array, dtype) -> Scaled:
    """`x` with scales for these largest magnitudes, arrays in float32."""
    largest = max_value(dtype)
    scaled = x * (largest / jnp.maximum(magnitude, MIN_MAGNITUDE))
    if jnp.issubdtype(dtype, jnp.integer):
        values = jnp.round(scaled).astype(jnp.int32).astype(dtype)
    else:  # the division may have rounded up, and beyond the largest is NaN or infinity
        scaled = jnp.clip(scaled, -largest, largest)
        is_cpu = hardware.platform() == "cpu"
        values = to_float8(scaled, dtype) if is_cpu else scaled.astype(dtype)
    return Scaled(values, magnitude * (1 / largest))


def quantize_groups(x_MK: jax.Array, group: int, dtype) -> Scaled:
    """Rows with a scale for each `group` of columns, (M, G)."""
    parts = [
        quantize(x_MK[:, start : start + group], 1, dtype)
        for start in range(0, x_MK.shape[1], group)
    ]
    return Scaled(*(jnp.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True)))


def group_columns(K: int) -> int:
    """Columns that share a scale in a row of K: the largest divisor up to 1024 that is whole lanes,
    else all. Devices with a slice of the columns then have the scales that one with all has."""
    multiples = range(min(K, MAX_GROUP_COLUMNS), 0, -1)
    return next((n for n in multiples if K % n == 0 and n % GROUP_MULTIPLE == 0), K)


def scaled_dot(x_MK: jax.Array, w: jax.Array, x_dim: int = 1, w_dim: int = 0) -> jax.Array:
    """x w of values in 8 bits, contracting these dimensions, in float32.

    On TPU, int8 is summed in int32 and float8 in float32. Elsewhere both are multiplied as
    float32, which holds products exactly and rounds sums beyond 2^24.
    """
    dims = (((x_dim,), (w_dim,)), ((), ()))
    if hardware.platform() != "tpu":
        x_MK, w = _as_float32(x_MK), _as_float32(w)
    sums = jnp.int32 if x_MK.dtype == jnp.int8 else jnp.float32
    return jax.lax.dot_general(x_MK, w, dims, preferred_element_type=sums).astype(jnp.float32)


def _as_float32(values: jax.Array) -> jax.Array:
    if is_float8(values.dtype) and hardware.platform() == "cpu":
        return from_float8(values)
    return values.astype(jnp.float32)


def integer_dot(x_MK: jax.Array, w_KN: jax.Array) -> jax.Array:
    """x w of int8 values, exact, in int32. On TPU at the rate of int8; elsewhere values are
    multiplied as float32, so many at a time as it sums exactly."""
    if hardware.platform() == "tpu":
        return jnp.dot(x_MK, w_KN, preferred_element_type=jnp.int32)
    y_MN = jnp.zeros((), jnp.int32)
    for start in range(0, len(w_KN), EXACT_PRODUCTS):
        part = slice(start, start + EXACT_PRODUCTS)
        x, w = x_MK[:, part].astype(jnp.float32), w_KN[part].astype(jnp.float32)
        y_MN += jnp.dot(x, w, preferred_element_type=jnp.float32).astype(jnp.int32)
    return y_MN


def scaled_product(x: Scaled, w: Scaled) -> jax.Array:
    """x w, (M, N) float32, of int8 rows (M, K) with scales (M, G) and of int8 or int4 columns (K,
    N) with scales for another number of groups, (G, N): the integer sum of what lies in one group
    of both, times both scales, is added to the next."""
    K, row_groups = len(w.values), x.scales.shape[1]
    row_group, group = K // row_groups, K // len(w.scales)
    y_MN, length = jnp.zeros((), jnp.float32), math.gcd(row_group, group)
    for start in range(0, K, length):
        part = slice(start, start + length)
        product = integer_dot(x.values[:, part], w.values[part].astype(jnp.int8))
        product = product.astype(jnp.float32)
        product *= w.scales[start // group].astype(jnp.float32)[None, :]
        if row_groups > 1:
            index = start // row_group
            product *= x.scales[:, index : index + 1]
        y_MN += product
    return y_MN if row_groups > 1 else y_MN * x.scales
