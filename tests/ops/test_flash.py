"""The TPU form of attention, interpreted, against the formula.

Letters: B rows, T length, N heads, K kv heads, H head_dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grok.ops.attention.causal import MASKED_LOGIT
from grok.ops.attention.flash import flash_attention, supports

B, T, N, K = 1, 384, 4, 2  # three blocks of a row
OPTIONS = {"scale": 0.3, "softcap": 5.0}  # logits of several units: the softcap matters

# Sums of at most 384 products and a softmax in two orders: some units of 2^-24 = 6e-8.
TOLERANCE = 5e-6


@pytest.fixture(scope="module", params=[128, 48])
def inputs(request) -> tuple[jax.Array, ...]:
    """q, k, v, factors of the result, and segments: three documents, then padding."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (N, K, K, N)
    H = request.param
    arrays = [jax.random.normal(k, (B, T, n, H)) for k, n in zip(keys, heads, strict=True)]
    index_1T = jnp.arange(T)[None, :]
    segment_BT = jnp.select([index_1T < 190, index_1T < 230, index_1T < 340], [1, 2, 3], 0)
    return *arrays, segment_BT


def formula(q_BTNH, k_BTKH, v_BTKH, segment_BT, *, scale, softcap, window=None) -> jax.Array:
    """Attention as it is defined, with keys repeated for the heads that share them."""
    k_BTNH, v_BTNH = (jnp.repeat(x, N // K, axis=2) for x in (k_BTKH, v_BTKH))
    logits_BNTS = scale * jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BTNH)
    logits_BNTS = softcap * jnp.tanh(logits_BNTS / softcap)
    earlier_TS = jnp.arange(T)[:, None] - jnp.arange(T)[None, :]
    seen_TS = (earlier_TS >= 0) & (earlier_TS < (window or T))
    seen_BTS = seen_TS[None] & (segment_BT[:, :, None] == segment_BT[:, None, :])
    weights = jax.nn.softmax(jnp.where(seen_BTS[:, None], logits_BNTS, MASKED_LOGIT), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, v_BTNH)


def value_and_gradients(attend, q, k, v, factor, segment) -> dict[str, jax.Array]:
    """The result o, and the gradients of its sum weighted by `factor`."""

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    def gradients(q, k, v):
        o = attend(q, k, v, segment)
        return jnp.sum(o * factor), o

    (dq, dk, dv), o = gradients(q, k, v)
    return {"o": o, "dq": dq, "dk": dk, "dv": dv}


@pytest.mark.parametrize("window", [None, 2, 40, 129, 1000])
def test_values_and_gradients_equal_the_formulas(inputs, window):
    options = OPTIONS | {"window": window}
    flash = functools.partial(flash_attention, interpret=True, **options)
    actual = value_and_gradients(flash, *inputs)
    expected = value_and_gradients(functools.partial(formula, **options), *inputs)
    for name, value in expected.items():
        error = np.abs(actual[name] - value).max() / np.abs(value).max()
        assert error < TOLERANCE, name


def test_which_lengths_it_takes():
    assert supports(8192) and supports(128) and not supports(100)
