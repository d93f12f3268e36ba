"""The TPU form of the experts, interpreted, against the reference that runs all on every row.

Letters: R rows, C chosen experts of a row, D embed, F mlp, E experts.
"""

import dataclasses
import functools
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import grok.model.moe
import grok.ops.moe.experts_pallas
from grok import hardware
from grok.ops.moe.experts_pallas import (
    experts_pallas,
    experts_pallas_split_mlp,
)
from grok.ops.moe.experts_xla import experts_reference
from grok.ops.moe.grouped_hidden import grouped_hidden_reference
from grok.ops.moe.grouped_matmul import grouped_matmul_reference, weight_gradient_reference
from grok.ops.moe.tiling import MlpSplits
from grok.ops.weights.lora import LoraArray
from grok.ops.weights.quantized import QuantizedArray, quantize
from tests.model import test_meshes
from tests.ops.test_experts_xla import (
    TOLERANCE,
    C,
    E,
    R,
    arrays,
    assert_near,
    routing,
    run_reference,
    value_and_gradients,
)

RACES = pltpu.InterpretParams(detect_races=True)

run_pallas = value_and_gradients(lambda *inputs: experts_pallas(*inputs, False, RACES))
run_split_mlp = value_and_gradients(
    lambda *inputs: experts_pallas_split_mlp(*inputs[:3], inputs[3:], list, MlpSplits(2, 2))
)


@pytest.fixture
def plain_kernels(monkeypatch) -> None:
    """The references in place of the kernels, which tests/ops/test_grouped_matmul.py compares."""

    def matmul(
        xs,
        ws,
        tiles_E,
        tile,
        *,
        dtype,
        transposed=False,
        max_tiles=None,
        start=None,
        interpret=False,
    ):
        ws = [jnp.swapaxes(w, 1, 2) if transposed else w for w in ws]
        products = [
            grouped_matmul_reference(x, w, tiles_E, tile) for x, w in zip(xs, ws, strict=True)
        ]
        return functools.reduce(jnp.add, products if start is None else [start, *products]).astype(
            dtype
        )

    def gradient(x, dy, tiles_E, tile, *, dtype, interpret=False):
        return weight_gradient_reference(x, dy, tiles_E, tile).astype(dtype)

    def hidden(*inputs, tiles_E, tile, activation, keep_products, max_tiles=None, interpret=False):
        return grouped_hidden_reference(*inputs, tiles_E, tile, activation=activation)

    monkeypatch.setattr(grok.ops.moe.experts_pallas, "grouped_hidden", hidden)
    monkeypatch.setattr(grok.ops.moe.experts_pallas, "grouped_matmul", matmul)
    monkeypatch.setattr(grok.ops.moe.experts_pallas, "grouped_weight_gradient", gradient)


def even(kind: str) -> np.ndarray:
    """Experts that all have as many rows, or nearly."""
    return (np.arange(R)[:, None] + np.arange(C)[None, :]) % E if kind == "even" else routing(kind)


@pytest.mark.parametrize("kind", ["even", "random", "all to the same two", "empty first and last"])
def test_values_and_gradients_equal_the_references(kind):
    expert_ids = even(kind)
    assert_near(run_pallas(arrays(R), expert_ids), run_reference(arrays(R), expert_ids), TOLERANCE)


@pytest.mark.parametrize("kind", ["random", "all to the same two", "empty first and last"])
def test_half_the_width_after_the_other_equals_the_references(kind, plain_kernels):
    expert_ids = even(kind)
    # Op by op: some loops that XLA makes for a CPU have the slope of GELU off by 1e-5.
    with jax.disable_jit():
        actual = run_split_mlp(arrays(R), expert_ids)
    assert_near(actual, run_reference(arrays(R), expert_ids), TOLERANCE)


def test_bfloat16_is_near_the_reference(plain_kernels):
    inputs, expert_ids = arrays(R, jnp.bfloat16), routing("random")
    run = value_and_gradients(experts_pallas)
    actual, expected = run(inputs, expert_ids), run_reference(inputs, expert_ids)
    assert actual.pop("y").dtype == jnp.bfloat16
    expected.pop("y")
    # Products are rounded to 8 bits, some three one after the other.
    assert_near(actual, expected, 2**-6)


def test_one_expert_a_row_and_all_rows_on_one_expert():
    x, topk_weights, *weights = arrays(R)
    expert_ids = jnp.full((R, 1), 3, jnp.int32)
    actual = jax.jit(experts_pallas, static_argnums=(6, 7))(
        x, topk_weights[:, :1], expert_ids, *weights, False, RACES
    )
    expected = experts_reference(x, topk_weights[:, :1], expert_ids, *weights)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * abs(expected).max())


@pytest.mark.parametrize(("integer", "groups"), [(jnp.int8, 2), (jnp.int4, 4)])
def test_quantized_weights(integer, groups):
    x, topk_weights, *weights = arrays(R)
    quantized = [QuantizedArray(*quantize(w, groups, dtype=integer)) for w in weights]
    expert_ids = jnp.asarray(routing("random"), jnp.int32)
    actual = jax.jit(experts_pallas, static_argnums=(6, 7))(
        x, topk_weights, expert_ids, *quantized, False, RACES
    )
    expected = experts_reference(
        x, topk_weights, expert_ids, *(w.dequantize(jnp.float32) for w in quantized)
    )
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * abs(expected).max())


def test_adapters_have_the_gradients_of_what_they_add_up_to(plain_kernels):
    x, topk_weights, *weights = arrays(R)
    expert_ids, keys = (
        jnp.asarray(routing("random"), jnp.int32),
        jax.random.split(jax.random.key(2), 6),
    )
    factors = [
        (
            jax.random.normal(keys[2 * i], (*w.shape[:2], 3)),
            jax.random.normal(keys[2 * i + 1], (E, 3, w.shape[2])),
        )
        for i, w in enumerate(weights)
    ]

    def loss(factors, beside: bool):
        pairs = zip(weights, factors, strict=True)
        if beside:
            adapted = [LoraArray(w, a, b) for w, (a, b) in pairs]
            y = experts_pallas(x, topk_weights, expert_ids, *adapted)
        else:
            y = experts_reference(x, topk_weights, expert_ids, *(w + a @ b for w, (a, b) in pairs))
        return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape)))

    run = jax.jit(jax.grad(loss), static_argnums=1)
    for ours, expected in zip(
        jax.tree.leaves(run(factors, True)), jax.tree.leaves(run(factors, False)), strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * abs(expected).max())


@pytest.mark.parametrize(
    ("sizes", "remat", "sandwich"),
    [
        pytest.param((2, 2, 2, 1), "full", True, marks=pytest.mark.prove),
        pytest.param((2, 2, 2, 1), "full", False, marks=pytest.mark.prove),
        ((2, 2, 2, 1), "experts", True),
        pytest.param((2, 1, 2, 2), "experts", True, marks=pytest.mark.prove),
    ],
)
def test_a_mesh_has_the_losses_and_gradients_of_one_device(
    sizes, remat, sandwich, plain_kernels, monkeypatch
):
    """One half of the experts' width is after the other, where their output is saved or no norm
    behind them wants it."""
    split_mlp = Mock(wraps=experts_pallas_split_mlp)
    monkeypatch.setattr(grok.model.moe, "experts_pallas_split_mlp", split_mlp)
    monkeypatch.setattr(hardware, "platform", lambda: "tpu")
    monkeypatch.setattr(grok.model.moe, "mlp_splits", lambda *_: MlpSplits(2, 2))
    norm = dataclasses.replace(test_meshes.CONFIG.norm, sandwich=sandwich)
    config = dataclasses.replace(test_meshes.CONFIG, norm=norm)
    losses_of = test_meshes.loss_and_gradients.__wrapped__
    (losses, ours), (right_losses, right) = (
        losses_of(sizes, dataclasses.replace(config, remat=remat)),
        test_meshes.loss_and_gradients(None, config),
    )
    for name, expected in (right_losses | right).items():
        error = np.abs((losses | ours)[name] - expected).max() / np.abs(expected).max()
        assert error < test_meshes.TOLERANCE, name
    assert split_mlp.called == (remat == "experts" or not sandwich)
