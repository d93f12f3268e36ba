"""Attention against float64 arithmetic written out head by head, and its forms against each other.

Letters: B rows, T query length, S key length, N heads, K kv heads, H head_dim.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grok.ops.attention.causal
from grok.ops.attention.causal import attention, attention_reference, temperature

B, T, N, K, H = 2, 32, 6, 2, 8
# Logits of several units: the softcap matters.
OPTIONS: dict[str, Any] = {"scale": 0.7, "softcap": 5.0}
# Windows shorter than documents, as long as some, longer than all, and of the query alone; a
# temperature that begins within the documents; all together, and none.
TERMS: list[dict[str, Any]] = [
    {},
    *({"window": window} for window in (1, 4, 9, 33)),
    {"temperature_length": 6},
    {"window": 7, "temperature_length": 3},
    {"softcap": None, "window": 7, "temperature_length": 3},
]

# Sums of at most 32 products and a softmax, in float32: some units of 2^-24 = 6e-8.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def inputs() -> tuple[jax.Array, ...]:
    """q, k, v, index, segments of queries and of keys: three documents a row, then padding."""
    keys = jax.random.split(jax.random.key(0), 3)
    q_BTNH = jax.random.normal(keys[0], (B, T, N, H))
    k_BSKH, v_BSKH = (jax.random.normal(key, (B, T, K, H)) for key in keys[1:])
    index_BT = jnp.tile(jnp.arange(T)[None, :], (B, 1))
    index_T = jnp.arange(T)
    segment_T = jnp.select([index_T < 11, index_T < 20, index_T < 29], [1, 2, 3], 0)
    segment_BT = jnp.stack([segment_T, jnp.ones_like(segment_T)])
    return q_BTNH, k_BSKH, v_BSKH, index_BT, segment_BT, segment_BT


@pytest.fixture(scope="module")
def positions(inputs) -> jax.Array:
    """Position of every token in its document."""
    segment_BT = np.asarray(inputs[4])
    return jnp.asarray([[list(row[:t]).count(row[t]) for t in range(T)] for row in segment_BT])


reference = jax.jit(functools.partial(attention_reference, **OPTIONS))


@pytest.fixture
def chunked(monkeypatch):
    """The form for long rows, made to work on this short one."""
    monkeypatch.setattr(grok.ops.attention.causal, "QUERY_BLOCK", 8)
    return jax.jit(lambda *inputs: attention(*inputs, **OPTIONS))


def by_hand(
    q_BTNH, k_BSKH, v_BSKH, index_BT, segment_BT, segment_BS, positions_BT=None, **terms
) -> np.ndarray:
    """One query of one head at a time, in float64; head n reads kv head n // (N / K)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BTNH, k_BSKH, v_BSKH))
    index, q_segment, k_segment = (np.asarray(x) for x in (index_BT, segment_BT, segment_BS))
    options = OPTIONS | terms
    o = np.zeros_like(q)
    for b, t, n in np.ndindex(*q.shape[:3]):
        first = max(0, index[b, t] + 1 - options.get("window", k.shape[1]))
        seen = [s for s in range(first, index[b, t] + 1) if k_segment[b, s] == q_segment[b, t]]
        head = n // (q.shape[2] // k.shape[2])
        logits = k[b, seen, head] @ q[b, t, n] * options["scale"]
        if options["softcap"]:
            logits = options["softcap"] * np.tanh(logits / options["softcap"])
        if (length := options.get("temperature_length")) and positions_BT[b, t] > length:
            logits = logits * np.log(positions_BT[b, t]) / np.log(length)
        weights = np.exp(logits)
        o[b, t, n] = weights @ v[b, seen, head] / weights.sum()
    return o


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_reference_computes_the_formula(inputs, positions, terms):
    actual = jax.jit(functools.partial(attention_reference, **OPTIONS | terms))(*inputs, positions)
    expected = by_hand(*inputs, positions, **terms)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("length", [2, 4, 1024])
def test_temperature_begins_behind_its_length(length):
    """It is 1 up to the length, counted from 0, and the logarithm's ratio from the next position
    on."""
    near = np.arange(max(0, length - 3), length + 4)
    positions = np.array([0, 1, *near, 2 * length, length**2, 131071])
    logarithms = np.log2(np.maximum(positions, 1)) / np.log2(length)
    expected = np.where(positions <= length, 1, logarithms)
    np.testing.assert_allclose(temperature(jnp.asarray(positions), length), expected, rtol=3e-7)


def test_new_queries_see_a_cache_up_to_their_own_place(inputs):
    """Queries 20 to 23 against all keys: what lies behind them in the cache is not seen."""
    q, k, v, _, _, _ = inputs
    index_BT = jnp.tile(jnp.arange(20, 24)[None, :], (B, 1))
    one_BT, one_BS = jnp.ones((B, 4), jnp.int32), jnp.ones((B, T), jnp.int32)
    args = (q[:, 20:24], k, v, index_BT, one_BT, one_BS)
    actual = reference(*args)
    np.testing.assert_allclose(actual, by_hand(*args), rtol=0, atol=TOLERANCE)
    later = reference(q[:, 20:24], k.at[:, 24:].set(9), v.at[:, 24:].set(9), *args[3:])
    np.testing.assert_array_equal(later, actual)


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_chunks_equal_the_reference(inputs, positions, terms, monkeypatch):
    monkeypatch.setattr(grok.ops.attention.causal, "QUERY_BLOCK", 8)
    actual, expected = (
        jax.jit(functools.partial(attend, **OPTIONS | terms))(*inputs, positions)
        for attend in (attention, attention_reference)
    )
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("terms", [TERMS[0], TERMS[-2]], ids=str)
def test_gradients_through_chunks_equal_the_references(inputs, positions, terms, monkeypatch):
    monkeypatch.setattr(grok.ops.attention.causal, "QUERY_BLOCK", 8)
    *arrays, index, segment, _ = inputs
    weight = jax.random.normal(jax.random.key(1), arrays[0].shape)

    def gradients(attend):
        def loss(q, k, v):
            o = attend(q, k, v, index, segment, segment, positions, **OPTIONS | terms)
            return jnp.sum(o * weight)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)

    pairs = zip(gradients(attention), gradients(attention_reference), strict=True)
    for name, (ours, expected) in zip("qkv", pairs, strict=True):
        error = np.abs(ours - expected).max() / np.abs(expected).max()
        assert error < TOLERANCE, name


def test_a_length_that_chunks_do_not_divide_is_not_cut(inputs, chunked):
    short = [x[:, :27] for x in inputs]
    np.testing.assert_allclose(chunked(*short), by_hand(*short), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("attend", ["reference", "chunked"])
def test_a_document_changes_nothing_in_another(inputs, attend, request):
    run = reference if attend == "reference" else request.getfixturevalue("chunked")
    q, k, v, index, segment, _ = inputs
    actual = np.asarray(run(*inputs))
    for document in (1, 2, 3):
        inside = (segment == document)[:, :, None, None]
        changed = [jnp.where(inside, -2 * x + 1, x) for x in (q, k, v)]
        again = np.asarray(run(*changed, index, segment, segment))
        other = np.asarray(segment != document)
        np.testing.assert_array_equal(again[other], actual[other])
        assert (again[0] != actual[0])[~other[0]].any()


def test_heads_of_a_group_share_a_kv_head_and_other_groups_do_not(inputs):
    q, k, v, *rest = inputs
    actual = np.asarray(reference(*inputs))
    changed = np.asarray(reference(q, k.at[:, :, 1].add(1), v.at[:, :, 1].add(1), *rest))
    group = N // K
    np.testing.assert_array_equal(changed[:, :, :group], actual[:, :, :group])
    assert (changed[:, :, group:] != actual[:, :, group:]).any(axis=(0, 1, 3)).all()


def test_bfloat16_products_with_a_float32_softmax(inputs):
    q, k, v, *rest = inputs
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    actual = reference(*half, *rest)
    assert actual.dtype == jnp.bfloat16
    exact = by_hand(*(x.astype(jnp.float32) for x in half), *rest)
    # Two roundings to 8 bits, of the weights and of the result: 2^-9 of the largest each.
    np.testing.assert_allclose(
        actual.astype(jnp.float32), exact, rtol=0, atol=2**-8 * abs(exact).max()
    )
