"""Attention over pages against float64 arithmetic on the sequences themselves, in both portable
forms, with and without int8 pages.

Letters: U sequences, Q new tokens of each, L layers, P pages of S tokens, M pages of a table, K kv
heads, N heads, H head_dim.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grok.ops.attention.paged
from grok.ops.attention.int8_pages import scale_lanes
from grok.ops.attention.paged import paged_attention, paged_attention_reference, write_pages

L, P, S, M, K, N, H = 2, 24, 4, 6, 2, 4, 8
LAYER = 1
STARTS, COUNTS = (3, 0, 17), (3, 2, 3)  # of three sequences, the second new
TERMS: list[dict[str, Any]] = [
    {"softcap": None},
    {"softcap": 5.0, "window": 1},
    {"softcap": None, "window": 6},
    {"softcap": None, "window": 40},
    {"softcap": 5.0, "temperature_length": 4},
    {"softcap": 5.0, "window": 6, "temperature_length": 4},
]
TABLE = np.array([[4, 1, 9, 15, 16, 17], [3, 7, 0, 20, 21, 22], [11, 2, 5, 6, 8, 10]], np.int32)


def sequences(length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q (U, T, N, H), k and v (U, T, K, H) of sequences of this length."""
    rng = np.random.default_rng(0)
    shapes = [(len(STARTS), length, heads, H) for heads in (N, K, K)]
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


def pages_of(k, v, dtype: str):
    """Pages with the keys and values of all tokens written to them; what was there is not finite,
    where the type has such values."""
    if dtype == "float32":
        kv, scale = jnp.full((L, P, S, K, 2, H), np.nan, dtype), None
    else:
        kv = jnp.full((L, P, K, 2, S, H), 99, dtype)
        scale = jnp.full((L, P, K, scale_lanes(S)), np.nan, jnp.float32)
    new = jnp.stack([k, v], axis=3)
    U = len(k)
    start, count = jnp.zeros(U, jnp.int32), jnp.full(U, k.shape[1], jnp.int32)
    return write_pages(kv, scale, jnp.int32(LAYER), new, jnp.asarray(TABLE), start, count)


def by_hand(q, k, v, *, softcap, window=None, temperature_length=None) -> np.ndarray:
    """One query of one head at a time, in float64."""
    o = np.zeros(q.shape)
    for u, t, n in np.ndindex(*q.shape[:3]):
        seen, head = slice(max(0, t + 1 - (window or t + 1)), t + 1), n * K // N
        logits = k[u, seen, head].astype(np.float64) @ q[u, t, n] * 0.5
        if softcap:
            logits = softcap * np.tanh(logits / softcap)
        if temperature_length and t > temperature_length:
            logits = logits * np.log(t) / np.log(temperature_length)
        weights = np.exp(logits - logits.max())
        o[u, t, n] = weights @ v[u, seen, head] / weights.sum()
    return o


def run(terms, dtype: str, *, table=TABLE, edit=lambda kv: kv, reference=False) -> np.ndarray:
    """The attention of three tokens of each sequence from STARTS on, (U, 3, N, H)."""
    q, k, v = sequences(max(STARTS) + 3)
    kv, scale = pages_of(k, v, dtype)
    q_UQNH = jnp.stack([q[u, start : start + 3] for u, start in enumerate(STARTS)])
    where = jnp.int32(LAYER), jnp.asarray(table), jnp.asarray(STARTS, jnp.int32)
    counts = () if reference else (jnp.asarray(COUNTS, jnp.int32),)
    attend = paged_attention_reference if reference else paged_attention
    attend = jax.jit(functools.partial(attend, scale=0.5, **terms))
    return np.asarray(attend(q_UQNH, edit(kv), scale, *where, *counts))


def expected(terms) -> np.ndarray:
    q, k, v = sequences(max(STARTS) + 3)
    o = by_hand(q, k, v, **terms)
    return np.stack([o[u, start : start + 3] for u, start in enumerate(STARTS)])


@pytest.fixture(params=[8, 128], ids=lambda keys: f"blocks of {keys}")
def kv_block(request, monkeypatch):
    monkeypatch.setattr(grok.ops.attention.paged, "KV_BLOCK", request.param)


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_blocks_compute_the_formula(terms, kv_block):
    np.testing.assert_allclose(run(terms, "float32"), expected(terms), rtol=0, atol=2e-6)


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_the_reference_computes_the_formula(terms):
    finite = {"edit": lambda kv: jnp.nan_to_num(kv, nan=99.0)}
    actual = run(terms, "float32", reference=True, **finite)
    np.testing.assert_allclose(actual, expected(terms), rtol=0, atol=2e-6)


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_int8_pages_differ_by_their_rounding_alone(terms, kv_block):
    """Each value is off by half of 1/127 of its head's largest at most."""
    np.testing.assert_allclose(run(terms, "int8"), expected(terms), rtol=0, atol=0.12)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_pages_behind_the_window_are_not_looked_at(dtype, kv_block):
    """Freed pages have other sequences' contents, and a table without them holds zeros."""
    terms = {"softcap": None, "window": 6}
    table = TABLE.copy()
    for u, start in enumerate(STARTS):
        table[u, : max(0, start - 6 + 1) // S] = 0
    assert (table != TABLE).sum() == 3
    freed = jnp.asarray(TABLE[table != TABLE])
    stale = np.nan if dtype == "float32" else -128
    edited = run(terms, dtype, table=table, edit=lambda kv: kv.at[:, freed].set(stale))
    np.testing.assert_array_equal(edited, run(terms, dtype))


@pytest.mark.parametrize("window", [None, 6])
def test_a_sequences_sums_do_not_depend_on_its_neighbours(window, kv_block):
    """To the bit: other sequences, longer, shorter or absent, add iterations that change
    nothing."""
    terms = {"softcap": 5.0, "window": window, "temperature_length": 4}
    q, k, v = sequences(20)
    kv, _ = pages_of(k, v, "float32")
    attend = jax.jit(functools.partial(paged_attention, scale=0.5, **terms))
    first = ([STARTS[2]] * 3, [17, 2, 9], [17, 0, 0])
    rows = []
    for starts, counts in zip(first, ([3] * 3, [3, 3, 3], [3, 0, 0]), strict=True):
        q_UQNH = jnp.stack([q[2, 17:20]] * 3)
        where = jnp.int32(LAYER), jnp.asarray(TABLE[[2, 0, 1]]), jnp.asarray(starts, jnp.int32)
        rows.append(attend(q_UQNH, kv, None, *where, jnp.asarray(counts, jnp.int32))[0])
    np.testing.assert_array_equal(rows[1], rows[0])
    np.testing.assert_array_equal(rows[2], rows[0])


def test_the_loop_begins_at_the_first_key_that_a_token_sees(monkeypatch):
    """Blocks of keys before it are not read, whatever padding beside it has as its position."""
    monkeypatch.setattr(grok.ops.attention.paged, "KV_BLOCK", 4)
    ranges = []

    def record(masked_logits, weighted_values, zeros, *blocks):
        ranges.append(tuple(map(int, blocks)))
        return zeros

    monkeypatch.setattr(grok.ops.attention.paged, "_two_pass_softmax", record)
    q, k, v = sequences(20)
    kv, _ = pages_of(k, v, "float32")
    starts, counts = jnp.asarray([12, 0, 17]), jnp.asarray([3, 0, 3])
    for window in (None, 1, 6, 9, 40):
        paged_attention(
            jnp.asarray(q[:, :3]),
            *(kv, None, LAYER, jnp.asarray(TABLE), starts, counts),
            scale=1.0,
            softcap=None,
            window=window,
        )
    # Of 12 - W + 1 to 19, in blocks of 4.
    assert ranges == [(0, 5), (3, 5), (1, 5), (1, 5), (0, 5)]
