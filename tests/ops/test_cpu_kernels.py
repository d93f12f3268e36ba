"""The kernels in C for few rows, against plain references; how they are compiled, or are not.

Letters: L layers, E experts, R rows, D contracted, F columns, V vocabulary, C chosen experts, G
groups of scales; U sequences, N heads, K kv heads, H head_dim, P pages of S tokens.
"""

import functools
import hashlib
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grok
from grok.config import AttentionConfig, ModelConfig, MoEConfig
from grok.model.attend import PagedBatch, PagedCache, init_cache
from grok.ops.attention.paged import paged_attention_reference
from grok.ops.cpu import calls, few_rows, library
from grok.ops.cpu.calls import Stack
from grok.ops.moe.experts_xla import experts_reference
from grok.ops.weights.quantized import dequantize, quantize

L, E, D, F, V, C, R = 3, 4, 44, 88, 131, 2, 13
LONG = 300  # rows of a matrix in several parts, of which groups of scales span two
KINDS = ("float32", "bfloat16", "int8", "int4", "int8:1", "int4:1")  # and groups of rows
LAYER = np.int32(2)

needs_kernels = pytest.mark.skipif(not library.load().is_usable, reason=library.load().reason)


def stack_of(kind: str, *shape: int, seed: int = 0) -> tuple[Stack, np.ndarray]:
    """Matrices of all layers as they are stored, and as float32; ints in 4 groups, or in 1."""
    w = np.random.default_rng(seed).standard_normal((L, *shape)).astype(np.float32)
    kind, _, groups = kind.partition(":")
    if kind in ("int8", "int4"):
        values, scales = quantize(w, int(groups or 4), dtype=jnp.dtype(kind))
        stack = Stack(jnp.asarray(values), jnp.asarray(scales))
        return stack, dequantize(values, scales, np.float32)
    stored = w.astype(kind)
    return Stack(jnp.asarray(stored)), stored.astype(np.float32)


def rows_of(columns: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(9).standard_normal((R, columns)).astype(dtype)


def assert_close(y, x, w) -> None:
    """Asserts that y is the product, to a millionth of its largest value."""
    expected = x.astype(np.float64) @ w.astype(np.float64)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6 * abs(expected).max())


@functools.cache
def multiply():
    return jax.jit(lambda x, *stacks: calls.multiply(x, LAYER, list(stacks)))


@needs_kernels
@pytest.mark.parametrize("D", [D, LONG])
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_matrices(kind, D):
    (wide, w_DF), (narrow, w_DV) = stack_of(kind, D, F), stack_of(kind, D, 6, seed=1)
    x_RD = rows_of(D)
    y_RF, y_RV = multiply()(x_RD, wide, narrow)
    assert_close(y_RF, x_RD, w_DF[LAYER])
    assert_close(y_RV, x_RD, w_DV[LAYER])


@needs_kernels
@pytest.mark.parametrize("D", [D, LONG])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_bits_do_not_depend_on_the_number_of_rows(kind, D):
    stack, _ = stack_of(kind, D, F)
    table_VD = stack_of("bfloat16" if kind == "bfloat16" else "float32", V, D)[0].values[0]
    score, x_RD = jax.jit(calls.score), rows_of(D)
    (all_RF,), all_RV = multiply()(x_RD, stack), score(x_RD, table_VD)
    assert_close(all_RV, x_RD, np.asarray(table_VD, np.float32).T)
    for rows in range(1, 9):
        last = x_RD[R - rows :]
        np.testing.assert_array_equal(multiply()(last, stack)[0], all_RF[R - rows :])
        np.testing.assert_array_equal(score(last, table_VD), all_RV[R - rows :])


@needs_kernels
def test_a_row_of_zeros_is_left_out():
    stack, _ = stack_of("float32", D, F)
    broken = Stack(stack.values.at[LAYER].set(np.nan))
    x_RD = rows_of(D)
    x_RD[3] = 0
    (y_RF,) = multiply()(x_RD, broken)
    np.testing.assert_array_equal(np.isnan(y_RF).all(1), np.arange(R) != 3)
    np.testing.assert_array_equal(y_RF[3], 0)


@needs_kernels
def test_float32_weights_are_rounded_to_bfloat16_inputs():
    stack, w_DF = stack_of("float32", D, F)
    x_RD = rows_of(D, "bfloat16")
    rounded = w_DF[LAYER].astype(jnp.bfloat16).astype(np.float32)
    (y_RF,) = multiply()(x_RD, stack)
    np.testing.assert_allclose(y_RF, x_RD.astype(np.float32) @ rounded, rtol=0, atol=2e-5)


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_int8_table_scores_as_the_floats_that_it_stands_for(dtype):
    floats_VD = rows_of(D)[:1] * np.linspace(-1, 1, V, dtype=np.float32)[:, None]
    floats_VD += np.random.default_rng(3).standard_normal((V, D)).astype(np.float32)
    values_VD, scale_V1 = quantize(floats_VD, 1, 1, 0)
    x_RD = rows_of(D, dtype)
    y_RV = calls.score(x_RD, values_VD, scale_V1[:, 0])
    table_VD = dequantize(values_VD, scale_V1, np.float32, 1, 0)
    assert_close(y_RV, x_RD.astype(np.float32), table_VD.T)
    for rows in range(1, 9):
        last = calls.score(x_RD[R - rows :], values_VD, scale_V1[:, 0])
        np.testing.assert_array_equal(last, y_RV[R - rows :])


def scores_of(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores with ties, the largest among them, and what is banned of them."""
    rng = np.random.default_rng(length)
    scores_RV = rng.integers(-9, 9, (R, length)).astype(np.float32)
    return scores_RV, rng.uniform(size=(R, length)) < 0.4


@needs_kernels
@pytest.mark.parametrize("length", [1, 7, 16, 24, 999, 8192])
def test_the_likeliest_is_the_first_that_is_not_banned(length):
    scores_RV, banned_RV = scores_of(length)
    banned_RV[2] = True  # all of them
    banned_RV[3], scores_RV[3] = False, -np.inf
    bits_RW = np.packbits(banned_RV, axis=1, bitorder="little")
    expected = np.argmax(np.where(banned_RV, -np.inf, scores_RV), axis=1)
    np.testing.assert_array_equal(calls.argmax(scores_RV, bits_RW), expected)
    np.testing.assert_array_equal(calls.argmax(scores_RV[5:6], bits_RW[5:6]), expected[5:6])


@needs_kernels
@pytest.mark.parametrize("length", [1, 7, 16, 999, 8192])
def test_logsumexp(length):
    scores_RV = rows_of(length) * np.geomspace(1e-3, 1e3, R, dtype=np.float32)[:, None]
    sums_R = calls.logsumexp(scores_RV)
    wide = scores_RV.astype(np.float64)
    expected = np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1)) + wide.max(1)
    np.testing.assert_allclose(sums_R, expected, rtol=2e-6, atol=2e-6)
    np.testing.assert_array_equal(calls.logsumexp(scores_RV[4:5]), sums_R[4:5])


@needs_kernels
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7F800000])  # NaNs, and infinity
@pytest.mark.parametrize("at", [0, 20, 39])
def test_a_score_that_is_not_finite_leaves_no_finite_sum(bits, at):
    scores_RV = rows_of(40)
    scores_RV[1, at] = np.uint32(bits).view(np.float32)
    np.testing.assert_array_equal(np.isfinite(calls.logsumexp(scores_RV)), np.arange(R) != 1)


def routing(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and experts, of which one row has none and one is of no expert here."""
    rng = np.random.default_rng(4)
    ids_RC = np.stack([rng.permutation(E)[:C] for _ in range(rows)]).astype(np.int32)
    ids_RC[1], ids_RC[2, 0] = E, -1
    return rng.uniform(size=(rows, C)).astype(np.float32), ids_RC


@needs_kernels
@pytest.mark.parametrize(
    ("kind", "activation"),
    [*((kind, "gelu_tanh") for kind in KINDS), ("float32", "silu"), ("float32", "gelu")],
)
@pytest.mark.parametrize(("D", "F"), [(D, F), (LONG, LONG)])
def test_experts_are_those_of_the_reference(kind, activation, D, F):
    shapes = (E, D, F), (E, D, F), (E, F, D)
    stacks, dense = zip(*(stack_of(kind, *s, seed=i) for i, s in enumerate(shapes)), strict=True)
    run = jax.jit(functools.partial(calls.experts, activation=activation))
    x_RD, (weights_RC, ids_RC) = rows_of(D), routing(R)
    y_RD = run(x_RD, weights_RC, ids_RC, LAYER, stacks)
    expected = experts_reference(
        x_RD, weights_RC, ids_RC, *(jnp.asarray(w[LAYER]) for w in dense), activation
    )
    np.testing.assert_allclose(y_RD, expected, rtol=0, atol=1e-6 * abs(expected).max())
    np.testing.assert_array_equal(y_RD[1], 0)
    for rows in (1, 3, 8):
        last = slice(R - rows, R)
        alone = run(x_RD[last], weights_RC[last], ids_RC[last], LAYER, stacks)
        np.testing.assert_array_equal(alone, y_RD[last])


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "terms",
    [
        {"softcap": None},
        {"softcap": 5.0, "window": 6},
        {"softcap": 5.0, "window": 1, "temperature_length": 4},
    ],
)
def test_attention_is_that_of_the_reference(dtype, terms):
    P, S, K, N, H = 16, 4, 2, 6, 20
    rng = np.random.default_rng(5)
    q_U1NH = rng.standard_normal((3, 1, N, H)).astype(dtype)
    kv = jnp.asarray(rng.standard_normal((L, P, S, K, 2, H)), dtype)
    table_UM = rng.permutation(P)[:15].reshape(3, 5).astype(np.int32)
    start_U, count_U = np.array([17, 2, 0], np.int32), np.array([1, 1, 0], np.int32)
    where = kv, LAYER, table_UM, start_U
    o_U1NH = few_rows.attention(q_U1NH, *where, count_U, scale=0.3, **terms)
    expected = paged_attention_reference(
        jnp.asarray(q_U1NH), kv, None, *where[1:], scale=0.3, **terms
    )
    assert o_U1NH.dtype == dtype
    tolerance = 1e-6 if dtype == "float32" else 0.02
    actual, expected = (np.asarray(o, np.float32) for o in (o_U1NH, expected))
    np.testing.assert_allclose(actual[:2], expected[:2], rtol=0, atol=tolerance)
    np.testing.assert_array_equal(actual[2], 0)


def digest() -> str:
    """Of the bits of all kinds of products, of shapes that are split among threads."""
    bits = hashlib.sha256()
    x_RD = rows_of(64)[:3]
    for kind in KINDS:
        stacks = tuple(stack_of(kind, E, *s)[0] for s in ((64, 2100), (64, 2100), (2100, 64)))
        y_RD = calls.experts(x_RD, *routing(3), LAYER, stacks, "silu")
        bits.update(np.asarray(y_RD).tobytes())
    bits.update(np.asarray(calls.score(x_RD, stack_of("float32", 999, 64)[0].values[0])).tobytes())
    return bits.hexdigest()


@needs_kernels
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_bits_do_not_depend_on_the_number_of_threads():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from tests.ops.test_cpu_kernels import digest; print(digest())"
    )
    command = [sys.executable, "-c", code]
    one = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=grok.__path__[0] + "/.."
    )
    assert one.stdout.split()[-1] == digest()


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        (library.SWITCH, "0", "asks for the portable forms"),
        ("PATH", "", "there is no C compiler here (cc, gcc, clang)"),
        ("CC", "false", "false failed"),
    ],
)
def test_without_the_library_there_is_a_reason(monkeypatch, tmp_path, variable, value, reason):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv(variable, value)
    found = library.load.__wrapped__()
    assert not found.is_usable
    assert reason in found.reason


def decode(model: grok.Grok, cache: PagedCache) -> tuple[np.ndarray, PagedCache]:
    """Logits of a step of four slots, of which one is empty, and the cache with the new tokens."""
    table_BUM = np.arange(8, dtype=np.int32).reshape(1, 4, 2)
    start_BU, count_BU = np.array([[9, 0, 15, 4]], np.int32), np.array([[1, 0, 1, 1]], np.int32)
    batch = PagedBatch(table_BUM, start_BU, count_BU)

    @jax.jit
    def step(model, cache):
        x_BTD, cache, _ = model.step(np.array([[5, 9, 2, 7]], np.int32), cache, batch)
        return model.next_logits(x_BTD, batch.count_BU), cache

    logits_BUV, cache = step(model, cache)
    return np.asarray(logits_BUV)[0], cache


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_decode_step_is_that_of_the_portable_forms(monkeypatch, dtype):
    config = ModelConfig(
        vocab_size=96,
        num_layers=2,
        embed_dim=32,
        moe=MoEConfig(dim=64),
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
        context_length=16,
        param_dtype=dtype,
        compute_dtype=dtype,
    )
    mesh = grok.make_mesh(devices=jax.devices()[:1])
    model = grok.init(config, jax.random.key(0), mesh)
    with jax.set_mesh(mesh):
        cache = init_cache(config, 8, 8, dtype)
        cache = jax.tree.map(lambda a: a + jnp.ones((), a.dtype), cache)
        by_kernels, cache_of_kernels = decode(model, cache)
        monkeypatch.setattr(few_rows, "is_usable", lambda: False)
        portable, portable_cache = decode(model, cache)
    live, tolerance = [0, 2, 3], 2e-6 if dtype == "float32" else 0.1
    np.testing.assert_allclose(by_kernels[live], portable[live], rtol=0, atol=tolerance)
    np.testing.assert_array_equal(by_kernels[1], 0)
    values = (np.asarray(cache.kv, np.float32) for cache in (cache_of_kernels, portable_cache))
    np.testing.assert_allclose(*values, rtol=0, atol=tolerance)
