"""Conversions of float8 by arithmetic have the bits of JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grok.ops.float8 import from_float8, to_float8

TYPES = (jnp.float8_e4m3fn, jnp.float8_e5m2)


@pytest.mark.parametrize("dtype", TYPES)
def test_every_value_is_itself(dtype):
    codes = np.arange(256, dtype=np.uint8)
    values = jnp.asarray(codes.view(dtype))
    floats = np.asarray(jax.jit(from_float8)(values))
    expected = codes.view(dtype).astype(np.float32)
    np.testing.assert_array_equal(floats, expected)
    np.testing.assert_array_equal(np.signbit(floats), codes >= 128)
    finite = np.isfinite(expected)
    back = np.asarray(to_float8(jnp.asarray(floats), dtype)).view(np.uint8)
    np.testing.assert_array_equal(back[finite], codes[finite])


@pytest.mark.parametrize("dtype", TYPES)
def test_others_are_rounded_to_the_nearest(dtype):
    codes = np.arange(256, dtype=np.uint8)
    values = np.sort(codes.view(dtype).astype(np.float32))
    values = values[np.isfinite(values)]
    midpoints = (values[1:] + values[:-1]) / 2
    near = [np.nextafter(midpoints, np.float32(side)) for side in (-np.inf, np.inf)]
    random = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    tiny = random * np.float32(2.0 ** (1 + jnp.finfo(dtype).minexp))
    x = np.concatenate([midpoints, *near, random, tiny, [np.nan, -0.0]]).astype(np.float32)
    expected = x.astype(dtype)
    rounded = np.asarray(to_float8(jnp.asarray(x), dtype))
    np.testing.assert_array_equal(np.isnan(rounded.astype(np.float32)), np.isnan(x))
    is_number = ~np.isnan(x)
    np.testing.assert_array_equal(
        rounded.view(np.uint8)[is_number], expected.view(np.uint8)[is_number]
    )
