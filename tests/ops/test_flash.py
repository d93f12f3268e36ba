"""The TPU form of attention, interpreted, against the plain reference.

Letters: B rows, T length, N heads, K kv heads, H head_dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grok.ops.attention.causal import attention_reference
from grok.ops.attention.flash import flash_attention, supports

B, T, N, K = 1, 256, 4, 2
OPTIONS = {"scale": 0.3, "softcap": 5.0}  # logits of several units: the softcap matters

# Sums of at most 256 products and a softmax in two orders: some units of 2^-24 = 6e-8.
TOLERANCE = 5e-6


@pytest.fixture(scope="module", params=[128, 48])
def inputs(request) -> tuple[jax.Array, ...]:
    """q, k, v, factors of the result, and segments: three documents, then padding."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (N, K, K, N)
    H = request.param
    arrays = [jax.random.normal(k, (B, T, n, H)) for k, n in zip(keys, heads, strict=True)]
    index_1T = jnp.arange(T)[None, :]
    segment_BT = jnp.select([index_1T < 90, index_1T < 130, index_1T < 240], [1, 2, 3], 0)
    return *arrays, segment_BT


@functools.partial(jax.jit, static_argnums=5)
def value_and_gradients(q, k, v, factor, segment, form):
    def loss(q, k, v):
        if form == "flash":
            o = flash_attention(q, k, v, segment, **OPTIONS, interpret=True)
        else:
            index = jnp.arange(T)[None, :]
            o = attention_reference(q, k, v, index, segment, segment, **OPTIONS)
        return jnp.sum(o * factor), o

    gradients, o = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return {"o": o, "dq": gradients[0], "dk": gradients[1], "dv": gradients[2]}


def test_values_and_gradients_equal_the_references(inputs):
    actual = value_and_gradients(*inputs, "flash")
    for name, expected in value_and_gradients(*inputs, "reference").items():
        error = np.abs(actual[name] - expected).max() / np.abs(expected).max()
        assert error < TOLERANCE, name


def test_which_lengths_it_takes():
    assert supports(8192) and supports(128) and not supports(100)
