"""The TPU forms of paged attention against the plain one: JAX's kernel, in whose place the authors'
reference stands, since it runs on no interpreter, and ours, interpreted.

Letters: U sequences of Q new tokens, L layers, P pages of S tokens, M pages of the longest
sequence, K kv heads, N heads, H head_dim.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

from grok.ops.attention import ragged, ragged_kernel
from grok.ops.attention.int8_pages import quantize_tokens, scale_lanes
from grok.ops.attention.paged import paged_attention_reference
from grok.ops.attention.ragged import ragged_attention, supports

L, S, M, H = 2, 8, 12, 128
OPTIONS = {"scale": 0.3, "softcap": 5.0}  # logits of several units: the softcap matters

# Sums of at most 96 products and a softmax in two orders: some units of 2^-24 = 6e-8.
TOLERANCE = 1e-5

# Lengths of sequences before the new tokens, of which some begin or end a page.
DECODE, PROMPTS = (1, [0, 7, 8, 57, 95]), (40, [0, 5, 56])


def make_inputs(Q: int, starts: list[int], N: int = 4, K: int = 2, dtype=jnp.float32):
    """Queries, pages of all layers, and (layer, table, starts)."""
    U = len(starts)
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (U, Q, N, H), dtype)
    kv = jax.random.normal(keys[1], (L, U * M + 1, S, K, 2, H), dtype)
    table = jax.random.permutation(keys[2], U * M + 1)[: U * M].reshape(U, M).astype(jnp.int32)
    return q, kv, (jnp.int32(1), table, jnp.asarray(starts, jnp.int32))


@pytest.mark.prove
def test_jaxs_kernel_computes_what_the_reference_does(monkeypatch):
    """Decode, and chunks of prompts of which the last ends behind the table."""

    def kernel(*arguments, num_kv_pages_per_block, num_queries_per_block, vmem_limit_bytes, **how):
        assert 0 < num_kv_pages_per_block <= arguments[3].shape[1]
        return ref_ragged_paged_attention(*arguments, **how)

    monkeypatch.setattr(ragged, "ragged_paged_attention", kernel)
    for queries, starts in (DECODE, (6, [0, 5, 90])):
        q, kv, where = make_inputs(queries, starts)
        expected = paged_attention_reference(q, kv, None, *where, **OPTIONS)
        actual = ragged_attention(q, kv, None, *where, **OPTIONS)
        np.testing.assert_allclose(actual, expected, atol=TOLERANCE)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of two pages, and of 16 tokens of two queries, so that there are several."""
    monkeypatch.setattr(ragged_kernel, "MAX_BLOCK_KEYS", 2 * S)
    monkeypatch.setattr(ragged_kernel, "MAX_BLOCK_QUERIES", 32)


def assert_equal(
    q, kv, where, tolerance=TOLERANCE, interpret=True, hidden=None, kv_scale=None, **terms
) -> None:
    """Compares with the reference; pages of `hidden` are not finite for the kernel."""
    terms = OPTIONS | terms
    expected = paged_attention_reference(q, kv, kv_scale, *where, **terms)
    if hidden is not None and kv_scale is None:
        kv = kv.at[:, jnp.asarray(hidden)].set(jnp.nan)
    elif hidden is not None:
        kv_scale = kv_scale.at[:, jnp.asarray(hidden)].set(jnp.nan)
    actual = ragged_attention(q, kv, kv_scale, *where, interpret=interpret, **terms)
    error = np.abs(actual.astype(jnp.float32) - expected.astype(jnp.float32))
    assert error.max() < tolerance * np.abs(expected.astype(jnp.float32)).max()


def hidden_pages(where, queries: int, window: int | None) -> np.ndarray:
    """Pages of the tables without a key that a query sees."""
    _, table, start = where
    first_U = 0 * start if window is None else jnp.maximum(start - window + 1, 0) // S
    end_U, page_1M = (start + queries - 1) // S + 1, jnp.arange(M)[None, :]
    hidden_UM = (page_1M < first_U[:, None]) | (page_1M >= end_U[:, None])
    return np.asarray(table)[np.asarray(hidden_UM)]


@pytest.mark.parametrize(("queries", "starts"), [DECODE, PROMPTS])
@pytest.mark.parametrize(
    ("window", "temperature_length"), [(None, 12), (1, None), (17, None), (17, 12), (1000, 12)]
)
def test_a_window_and_a_temperature(queries, starts, window, temperature_length, small_blocks):
    inputs = make_inputs(queries, starts)
    assert_equal(*inputs, window=window, temperature_length=temperature_length)


@pytest.mark.parametrize(("N", "K"), [(1, 1), pytest.param(8, 1, marks=pytest.mark.prove), (6, 3)])
def test_other_groups_of_heads_without_a_cap(N, K, small_blocks):
    for queries, starts in (DECODE, PROMPTS):
        inputs = make_inputs(queries, starts, N, K)
        assert_equal(*inputs, softcap=None, scale=0.1, window=50, temperature_length=12)


def test_bfloat16(small_blocks):
    """Rounded to 8 bits: the weights before they are multiplied, and the result."""
    for queries, starts in (DECODE, PROMPTS):
        inputs = make_inputs(queries, starts, dtype=jnp.bfloat16)
        assert_equal(*inputs, tolerance=2**-7, temperature_length=12)


def test_pages_without_a_key_that_is_seen_do_not_matter(small_blocks):
    """Neither a page behind the window nor one beyond the end may matter, nor what is left in the
    kernel's memory."""
    interpret = pltpu.InterpretParams(uninitialized_memory="nan")
    for queries, starts in (DECODE, PROMPTS):
        q, kv, where = make_inputs(queries, starts)
        hidden = hidden_pages(where, queries, 17)
        assert_equal(q, kv, where, window=17, interpret=interpret, hidden=hidden)


@pytest.mark.parametrize(
    ("N", "K", "terms"),
    [
        (4, 2, {}),
        (3, 1, {"window": 17}),
        (4, 2, {"window": 17, "temperature_length": 12, "softcap": None}),
    ],
    ids=str,
)
def test_int8_pages(N, K, terms, small_blocks):
    """Scales of pages that nobody sees are not finite, nor is what the kernel's memory held."""
    interpret = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    for queries, starts in (DECODE, PROMPTS):
        q, kv, where = make_inputs(queries, starts, N, K)
        values, scale = quantize_tokens(kv)
        T = scale_lanes(S)
        rows = jnp.full((*kv.shape[:2], K, T), jnp.nan)
        for i in range(2):
            first = i * T // 2
            rows = rows.at[..., first : first + S].set(jnp.swapaxes(scale[..., i], 2, 3))
        int8 = {"kv": jnp.moveaxis(values, 2, 4), "kv_scale": rows}
        hidden = hidden_pages(where, queries, terms.get("window"))
        assert_equal(q, **int8, where=where, interpret=interpret, hidden=hidden, **terms)


def test_padding_behind_the_table_does_no_harm(small_blocks):
    """A prompt's last block is filled up; only its first tokens are in the table."""
    q, kv, where = make_inputs(40, [80])
    terms = OPTIONS | {"window": 17, "temperature_length": 12}
    expected = paged_attention_reference(q, kv, None, *where, **terms)
    actual = ragged_attention(q, kv, None, *where, interpret=True, **terms)
    np.testing.assert_allclose(actual[:, :16], expected[:, :16], atol=TOLERANCE)
    assert np.isfinite(actual).all()


def test_which_pages_it_takes():
    bfloat16, int8 = (L, 1, 16, 1, 2, 128), (L, 1, 1, 2, 32, 128)
    assert supports(jnp.zeros(bfloat16, jnp.bfloat16), 128)
    assert not any(supports(jnp.zeros(bfloat16, jnp.bfloat16), width) for width in (64, 256))
    assert supports(jnp.zeros(int8, jnp.int8), 128)
    assert not supports(jnp.zeros((L, 1, 1, 2, 16, 128), jnp.int8), 128)  # a tile has 32 rows
