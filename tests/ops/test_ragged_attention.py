"""The TPU form of paged attention, with the authors' reference in place of JAX's kernel: the kernel
runs on no interpreter, and `grok plan` compiles it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

from grok.ops.attention import ragged
from grok.ops.attention.paged import paged_attention_reference
from grok.ops.attention.ragged import ragged_attention, supports

# Layers, pages, tokens of a page, kv heads, heads, head_dim.
L, P, S, K, N, H = 2, 12, 8, 2, 4, 128
OPTIONS = {"scale": 0.3, "softcap": 5.0}  # logits of several units: the softcap matters


@pytest.mark.parametrize(("queries", "starts"), [(1, [0, 7, 20]), (6, [0, 5, 18])])
def test_it_computes_what_the_reference_does(queries, starts, monkeypatch):
    """Decode, and chunks of prompts of which the last ends behind the table."""
    keys = jax.random.split(jax.random.key(0), 2)
    q = jax.random.normal(keys[0], (len(starts), queries, N, H))
    kv = jax.random.normal(keys[1], (L, P, S, K, 2, H))
    table = jnp.asarray([[4, 1, 9], [3, 7, 0], [11, 2, 5]], jnp.int32)
    where = (jnp.int32(1), table, jnp.asarray(starts, jnp.int32))
    expected = paged_attention_reference(q, kv, None, *where, **OPTIONS)

    def kernel(*arguments, num_kv_pages_per_block, num_queries_per_block, vmem_limit_bytes, **how):
        assert 0 < num_kv_pages_per_block <= arguments[3].shape[1]
        return ref_ragged_paged_attention(*arguments, **how)

    monkeypatch.setattr(ragged, "ragged_paged_attention", kernel)
    actual = ragged_attention(q, kv, *where, **OPTIONS)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_which_pages_it_takes():
    assert supports(jnp.zeros((), jnp.bfloat16), 128)
    assert not supports(jnp.zeros((), jnp.int8), 128)
    assert not supports(jnp.zeros((), jnp.bfloat16), 64)
