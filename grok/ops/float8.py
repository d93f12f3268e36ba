"""float8 on CPU, where XLA computes it in a wider type: conversions by arithmetic on 32-bit lanes,
to the bit those of `astype`, and arrays as bytes, so that a loop writes to one without converting
all of it."""

import jax
import jax.numpy as jnp

SIGN, MAGNITUDE = 0x80, 0x7F


def is_float8(dtype) -> bool:
    """True of the types that are multiplied."""
    return dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2)


def as_bytes(values: jax.Array) -> jax.Array:
    """float8 as uint8; other arrays as they are."""
    return jax.lax.bitcast_convert_type(values, jnp.uint8) if is_float8(values.dtype) else values


def from_bytes(values: jax.Array, dtype) -> jax.Array:
    """The array of type `dtype` of which `as_bytes` made `values`."""
    return jax.lax.bitcast_convert_type(values, dtype) if is_float8(dtype) else values


def to_float8(x: jax.Array, dtype) -> jax.Array:
    """The nearest values of a float8 type to float32 `x`, none of which is beyond its largest."""
    mantissa, bias = _format(dtype)
    shift = 23 - mantissa
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    magnitude = bits & 0x7FFFFFFF
    to_even = (1 << (shift - 1)) - 1 + (magnitude >> shift & 1)
    normal = (magnitude + to_even >> shift) - (127 - bias << mantissa)
    subnormal = jnp.round(jnp.abs(x) * 2.0 ** (bias - 1 + mantissa)).astype(jnp.uint32)
    code = jnp.where(jnp.abs(x) < 2.0 ** (1 - bias), subnormal, normal)
    code = jnp.where(jnp.isnan(x), MAGNITUDE, code) | bits >> 24 & SIGN
    return jax.lax.bitcast_convert_type(code.astype(jnp.uint8), dtype)


def from_float8(values: jax.Array) -> jax.Array:
    """Values of a float8 type as float32."""
    mantissa, bias = _format(values.dtype)
    code = jax.lax.bitcast_convert_type(values, jnp.uint8).astype(jnp.uint32)
    magnitude = code & MAGNITUDE
    normal = (magnitude << 23 - mantissa) + (127 - bias << 23)
    subnormal = magnitude.astype(jnp.int32).astype(jnp.float32) * 2.0 ** (1 - bias - mantissa)
    if values.dtype == jnp.float8_e5m2:  # whose last exponent has infinity and NaN
        special = magnitude << 23 - mantissa | 0x7F800000
        normal = jnp.where(magnitude >> mantissa == MAGNITUDE >> mantissa, special, normal)
    else:
        normal = jnp.where(magnitude == MAGNITUDE, 0x7FC00000, normal)
    is_subnormal = magnitude < 1 << mantissa
    bits = jnp.where(is_subnormal, jax.lax.bitcast_convert_type(subnormal, jnp.uint32), normal)
    return jax.lax.bitcast_convert_type(bits | (code & SIGN) << 24, jnp.float32)


def _format(dtype) -> tuple[int, int]:
    """Bits of the mantissa, and what is added to the exponent."""
    info = jnp.finfo(dtype)
    return info.nmant, 1 - info.minexp
