"""Experts of int8 activations and int8 or int4 matrices: the kernel, interpreted, and the plain
form, against NumPy; and rows that depend on no other.

Letters: R rows, C chosen experts of a row, D embed, F mlp, E experts, K contracted axis.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from grok.ops import scaled
from grok.ops.moe import tiling
from grok.ops.moe.experts_int8 import experts_int8
from grok.ops.moe.experts_scaled import quantize_rows
from grok.ops.weights.quantized import QuantizedArray, quantize
from tests.ops.test_experts_xla import C, R, arrays, routing

RACES = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
TYPES = [(jnp.int8, 2), (jnp.int4, 4)]
each_type = pytest.mark.parametrize(("dtype", "groups"), TYPES)
# Sums of groups in other orders round otherwise, and may round a hidden value to the next of 127: a
# part in 1 / 127 of one of some 37 * 2 * 12.
TOLERANCE = 1e-3


@pytest.fixture(autouse=True)
def groups_of_four_columns(monkeypatch):
    """Three scales for each hidden row of twelve values."""
    monkeypatch.setattr(scaled, "MAX_GROUP_COLUMNS", 4)
    monkeypatch.setattr(scaled, "GROUP_MULTIPLE", 4)


def matrices(dtype, groups: int) -> list[QuantizedArray]:
    """The second of two layers, whose first is another."""
    weights = arrays(R)[2:]
    quantized = [quantize(w, groups, dtype=dtype) for w in weights]
    return [
        QuantizedArray(jnp.stack([-v, v]), jnp.stack([2 * s, s]), layer=jnp.int32(1))
        for v, s in quantized
    ]


@functools.partial(jax.jit, static_argnums=4)
def run(x_RD, topk_weights_RC, expert_ids_RC, weights, interpret=None):
    rows = quantize_rows(x_RD, "int8")
    return experts_int8(rows, topk_weights_RC, expert_ids_RC, *weights, "silu", interpret)


def rounded(x: np.ndarray, group: int) -> np.ndarray:
    """`x` by 127 steps a side for each `group` of columns, float64."""
    parts = x.reshape(len(x), -1, group)
    step = np.abs(parts).max(axis=2, keepdims=True) / 127
    return (np.rint(parts / step) * step).reshape(x.shape)


def reference(x, topk_weights, expert_ids, weights) -> np.ndarray:
    """One row and expert after the other, in float64."""
    gate, up, down = (np.asarray(w.dequantize(jnp.float32), np.float64) for w in weights)
    rows, y = rounded(np.asarray(x, np.float64), x.shape[1]), np.zeros(x.shape)
    for r, c in np.ndindex(len(x), C):
        e = expert_ids[r, c]
        a, b = rows[r] @ gate[e], rows[r] @ up[e]
        hidden = rounded((a / (1 + np.exp(-a)) * b)[None], 4)[0]
        y[r] += topk_weights[r, c] * (hidden @ down[e])
    return y


def error(actual, expected) -> float:
    """Norm of the difference over the norm."""
    return float(np.linalg.norm(np.asarray(actual) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("interpret", [None, RACES], ids=["plain", "kernel"])
@each_type
def test_values_are_those_of_the_reference(dtype, groups, interpret):
    x, topk_weights, *_ = arrays(R)
    weights, ids = matrices(dtype, groups), routing("empty first and last")
    actual = run(x, topk_weights, ids, weights, interpret)
    assert error(actual, reference(x, topk_weights, ids, weights)) < TOLERANCE


def test_blocks_that_neither_hold_groups_nor_lie_in_one(monkeypatch):
    """Four rows at a time of a down matrix with a scale for every six."""
    monkeypatch.setattr(tiling, "_block_sides", lambda *_: (4, 4))
    x, topk_weights, *_ = arrays(R)
    weights, ids = matrices(jnp.int8, 2), routing("random")
    run.clear_cache()
    actual = run(x, topk_weights, ids, weights, RACES)
    run.clear_cache()
    assert error(actual, reference(x, topk_weights, ids, weights)) < TOLERANCE


def test_a_row_depends_on_no_other():
    """To the last bit, with others or alone, whatever the others are and in whichever order."""
    x, topk_weights, *_ = arrays(R)
    weights, ids = matrices(jnp.int4, 4), routing("random")
    together = np.asarray(run(x, topk_weights, ids, weights))
    order = np.random.default_rng(0).permutation(R)
    others = order != 7
    shuffled = jnp.where(others[:, None], x[order], 1e3 * x[order])
    again = np.asarray(run(shuffled, topk_weights[order], ids[order], weights))
    np.testing.assert_array_equal(again[others], together[order][others])
    alone = run(x[:1], topk_weights[:1], ids[:1], weights)
    np.testing.assert_array_equal(alone, together[:1])


def test_integer_sums_are_exact_beyond_what_float32_holds():
    K = 5000
    x, w = (jnp.full(shape, 127, jnp.int8) for shape in ((3, K), (K, 2)))
    w = w.at[0].set(126)
    np.testing.assert_array_equal(scaled.integer_dot(x, w), np.full((3, 2), K * 127**2 - 127))
