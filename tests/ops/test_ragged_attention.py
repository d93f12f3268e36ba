"""The TPU form of paged attention, with the authors' reference in place of JAX's kernel: the kernel
runs on no interpreter, and `grok plan` compiles it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

from grok.ops.attention import ragged
from grok.ops.attention.ragged import ragged_attention, supports

# Layers, pages, tokens of a page, kv heads, heads, head_dim.
L, P, S, K, N, H = 2, 12, 8, 2, 4, 128
OPTIONS = {"scale": 0.3, "softcap": 5.0}  # logits of several units: the softcap matters


def by_hand(q_UQNH, kv, layer, table_UM, start_U, *, scale, softcap, window=None) -> np.ndarray:
    """One query of one head at a time, in float64."""
    q, kv = (np.asarray(x, np.float64) for x in (q_UQNH, kv[layer]))
    o = np.zeros_like(q)
    for u, i, n in np.ndindex(*q.shape[:3]):
        tokens = kv[np.asarray(table_UM[u])].reshape(-1, K, 2, H)
        last = int(start_U[u]) + i
        first = 0 if window is None else max(0, last - window + 1)
        k, v = np.moveaxis(tokens[first : last + 1, n // (N // K)], 1, 0)
        logits = softcap * np.tanh(scale * (k @ q[u, i, n]) / softcap)
        weights = np.exp(logits - logits.max(initial=0))
        o[u, i, n] = weights @ v / weights.sum()
    return o


@pytest.mark.parametrize("window", [None, 1, 9, 100])
@pytest.mark.parametrize(("queries", "starts"), [(1, [0, 7, 20]), (6, [0, 5, 18])])
def test_it_computes_the_formula(queries, starts, window, monkeypatch):
    """Decode, and chunks of prompts."""
    keys = jax.random.split(jax.random.key(0), 2)
    q = jax.random.normal(keys[0], (len(starts), queries, N, H))
    kv = jax.random.normal(keys[1], (L, P, S, K, 2, H))
    table = jnp.asarray([[4, 1, 9], [3, 7, 0], [11, 2, 5]], jnp.int32)
    where = (jnp.int32(1), table, jnp.asarray(starts, jnp.int32))
    options = OPTIONS | {"window": window}
    expected = by_hand(q, kv, *where, **options)

    def kernel(*arguments, num_kv_pages_per_block, num_queries_per_block, vmem_limit_bytes, **how):
        assert 0 < num_kv_pages_per_block <= arguments[3].shape[1]
        return ref_ragged_paged_attention(*arguments, **how)

    monkeypatch.setattr(ragged, "ragged_paged_attention", kernel)
    actual = ragged_attention(q, kv, *where, **options)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_which_pages_it_takes():
    assert supports(jnp.zeros((), jnp.bfloat16), 128)
    assert not supports(jnp.zeros((), jnp.int8), 128)
    assert not supports(jnp.zeros((), jnp.bfloat16), 64)
