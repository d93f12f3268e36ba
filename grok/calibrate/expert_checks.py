"""Checks of the kernels of routed experts, and of the products that they are made of.

Letters: R rows (tokens), C chosen experts of a row, D embed, F mlp, E experts, P slots, M rows of a
tile, K contracted axis and N columns of a product.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from grok.calibrate.check import Check, Sizes, normal, with_terms
from grok.ops.mlp import gated_activation
from grok.ops.moe import experts_pallas, grouped_hidden, grouped_matmul
from grok.ops.moe.experts_xla import experts_reference, experts_xla
from grok.ops.moe.tiling import MlpSplits, serving_tile_rows, xla_tile_rows
from grok.ops.weights.layer_slice import LayerSlice
from grok.ops.weights.lora import LoraArray
from grok.ops.weights.quantized import QuantizedArray, quantize

CHOSEN = 2  # experts of a row


def _matrices(sizes: Sizes) -> list[jax.Array]:
    """Gate, up and down of all experts, with outputs of unit size."""
    E, D, F = sizes.experts, sizes.embed, sizes.mlp
    gate, up, down = normal(sizes, (E, D, F), (E, D, F), (E, F, D))
    return [gate * D**-0.5, up * D**-0.5, down * F**-0.5]


# Grouped products. An expert has no tile, another several.


def _tiles(sizes: Sizes) -> jax.Array:
    return jnp.asarray([2, 0, 1, *[1] * (sizes.experts - 3)], jnp.int32)


def _grouped_inputs(sizes: Sizes) -> tuple:
    """x_PK, dy_PN, w_EKN, the tiles of the experts, and a tile of rows without values."""
    E, K, N, P = sizes.experts, sizes.embed, sizes.mlp, sizes.tile * (sizes.experts + 2)
    x_PK, dy_PN, w_EKN = normal(sizes, (P, K), (P, N), (E, K, N))
    return x_PK, dy_PN, w_EKN, _tiles(sizes), jnp.zeros(sizes.tile)


def _used(y_PN, tiles_E, tile_M) -> jax.Array:
    """Rows of the tiles that there are, and zeros: what lies behind them is not written."""
    is_used_P = jnp.arange(len(y_PN)) < jnp.sum(tiles_E) * len(tile_M)
    return jnp.where(is_used_P[:, None], y_PN, 0)


def _quantized(w, dtype: Any) -> QuantizedArray:
    """The matrices as layer 1 of two, as serving has them, two groups of rows each."""
    values, scales = quantize(w, 2, dtype=dtype)
    stack = jnp.stack([jnp.zeros_like(values), values]), jnp.stack([scales, scales])
    return QuantizedArray(*stack, layer=jnp.int32(1))


_int8 = functools.partial(_quantized, dtype=jnp.int8)
_int4 = functools.partial(_quantized, dtype=jnp.int4)


def _matmul(x_PK, dy_PN, w_EKN, tiles_E, tile_M, interpret, *, transposed=False, store=None):
    xs = dy_PN if transposed else x_PK
    w = store(w_EKN) if store else w_EKN
    y_PN = grouped_matmul.grouped_matmul(
        (xs,), (w,), tiles_E, len(tile_M), dtype=x_PK.dtype, transposed=transposed,
        interpret=interpret,
    )  # fmt: skip
    return {"y": _used(y_PN, tiles_E, tile_M)}


def _matmul_reference(x_PK, dy_PN, w_EKN, tiles_E, tile_M, *, transposed=False, store=None):
    xs = dy_PN if transposed else x_PK
    w = jnp.swapaxes(w_EKN, 1, 2) if transposed else w_EKN
    w = store(w) if store else w
    return {"y": grouped_matmul.grouped_matmul_reference(xs, w, tiles_E, len(tile_M))}


def _hidden(x_PK, dy_PN, w_EKN, tiles_E, tile_M, interpret):
    results = grouped_hidden.grouped_hidden(
        x_PK, w_EKN, w_EKN[:, ::-1], tiles_E, len(tile_M), activation=gated_activation,
        keep_products=True, interpret=interpret,
    )  # fmt: skip
    names = "hidden", "gate", "up"
    return {n: _used(y, tiles_E, tile_M) for n, y in zip(names, results, strict=True)}


def _hidden_reference(x_PK, dy_PN, w_EKN, tiles_E, tile_M):
    results = grouped_hidden.grouped_hidden_reference(
        x_PK, w_EKN, w_EKN[:, ::-1], tiles_E, len(tile_M), activation=gated_activation
    )
    return dict(zip(("hidden", "gate", "up"), results, strict=True))


def _weight_gradient(x_PK, dy_PN, w_EKN, tiles_E, tile_M, interpret):
    return {
        "dw": grouped_matmul.grouped_weight_gradient(
            x_PK, dy_PN, tiles_E, len(tile_M), dtype=jnp.float32, interpret=interpret
        )
    }


def _weight_gradient_reference(x_PK, dy_PN, w_EKN, tiles_E, tile_M):
    reference = grouped_matmul.weight_gradient_reference
    return {"dw": reference(x_PK, dy_PN, tiles_E, len(tile_M))}


# The routed experts.


def _experts_inputs(sizes: Sizes) -> tuple:
    """x_RD, weights and ids of the chosen experts, the matrices, and factors of an adapter."""
    R, D, E, F = sizes.rows, sizes.embed, sizes.experts, sizes.mlp
    x_RD, logits_RE = normal(sizes, (R, D), (R, E))
    weights_RC, ids_RC = jax.lax.top_k(logits_RE.astype(jnp.float32), CHOSEN)
    shapes = [shape for m, n in ((D, F), (D, F), (F, D)) for shape in ((E, m, 8), (E, 8, n))]
    factors = [0.3 * factor for factor in normal(sizes, *shapes)]
    rows = x_RD, jax.nn.sigmoid(weights_RC), ids_RC.astype(jnp.int32)
    return *rows, _matrices(sizes), factors


def _value_and_gradients(experts, x_RD, weights_RC, ids_RC, trained) -> dict[str, jax.Array]:
    """The result y, and gradients of a sum of it with factors between -1 and 1."""

    def loss(x_RD, weights_RC, trained):
        y_RD = experts(x_RD, weights_RC, ids_RC, trained)
        factors = jnp.cos(jnp.arange(y_RD.size, dtype=jnp.float32)).reshape(y_RD.shape)
        return jnp.sum(y_RD.astype(jnp.float32) * factors), y_RD

    gradient = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
    (dx, dweights, dtrained), y_RD = gradient(x_RD, weights_RC, trained)
    named = {f"dw{i}": dw for i, dw in enumerate(dtrained)}
    return {"y": y_RD, "dx": dx, "dweights": dweights} | named


def _experts(x_RD, weights_RC, ids_RC, matrices, factors, interpret):
    def run(x, weights, ids, matrices):
        return experts_pallas.experts_pallas(x, weights, ids, *matrices, False, interpret)

    return _value_and_gradients(run, x_RD, weights_RC, ids_RC, matrices)


def _experts_split(x_RD, weights_RC, ids_RC, matrices, factors, interpret):
    def run(x, weights, ids, matrices):
        split = experts_pallas.experts_pallas_split_mlp
        return split(x, weights, ids, tuple(matrices), list, MlpSplits(2, 2), False, interpret)

    return _value_and_gradients(run, x_RD, weights_RC, ids_RC, matrices)


def _experts_plain(x_RD, weights_RC, ids_RC, matrices, factors, interpret):
    """The portable implementation, in tiles as in training."""
    R, C = ids_RC.shape
    tile = xla_tile_rows(R, C, len(matrices[0]))

    def run(x, weights, ids, matrices):
        return experts_xla(x, weights, ids, *matrices, tile)

    return _value_and_gradients(run, x_RD, weights_RC, ids_RC, matrices)


def _experts_reference(x_RD, weights_RC, ids_RC, matrices, factors):
    def run(x, weights, ids, matrices):
        return experts_reference(x, weights, ids, *matrices)

    return _value_and_gradients(run, x_RD, weights_RC, ids_RC, matrices)


def _experts_int8(x_RD, weights_RC, ids_RC, matrices, factors, interpret):
    run: Callable = experts_pallas.experts_pallas
    return {"y": run(x_RD, weights_RC, ids_RC, *map(_int8, matrices), False, interpret)}


def _experts_int8_reference(x_RD, weights_RC, ids_RC, matrices, factors):
    dense = [_int8(w).dequantize(x_RD.dtype) for w in matrices]
    return {"y": experts_reference(x_RD, weights_RC, ids_RC, *dense)}


def _pairs(matrices, factors):
    return zip(matrices, factors[::2], factors[1::2], strict=True)


def _experts_lora(x_RD, weights_RC, ids_RC, matrices, factors, interpret):
    def run(x, weights, ids, factors):
        adapted = [LoraArray(w, a, b) for w, a, b in _pairs(matrices, factors)]
        return experts_pallas.experts_pallas(x, weights, ids, *adapted, False, interpret)

    return _value_and_gradients(run, x_RD, weights_RC, ids_RC, factors)


def _experts_lora_reference(x_RD, weights_RC, ids_RC, matrices, factors):
    def run(x, weights, ids, factors):
        dense = [w + a @ b for w, a, b in _pairs(matrices, factors)]
        return experts_reference(x, weights, ids, *dense)

    return _value_and_gradients(run, x_RD, weights_RC, ids_RC, factors)


def _few_rows(sizes: Sizes) -> tuple:
    """Three rows, and the matrices as layer 1 of two."""
    x_RD, weights_RC, ids_RC, matrices, _ = _experts_inputs(sizes)
    stacks = [jnp.stack([jnp.zeros_like(w), w]) for w in matrices]
    return x_RD[:3], weights_RC[:3], ids_RC[:3], stacks


def _experts_in_place(x_RD, weights_RC, ids_RC, stacks, interpret):
    """As a decode step has them on CPU: matrices read where they lie."""
    R, C = ids_RC.shape
    tile = serving_tile_rows(R, C, stacks[0].shape[1])
    layers = [LayerSlice(stack, jnp.int32(1)) for stack in stacks]
    return {"y": experts_xla(x_RD, weights_RC, ids_RC, *layers, tile)}


def _experts_in_place_reference(x_RD, weights_RC, ids_RC, stacks):
    return {"y": experts_reference(x_RD, weights_RC, ids_RC, *(stack[1] for stack in stacks))}


_GROUPED: tuple[Check, ...] = (
    Check("grouped_matmul", _grouped_inputs, _matmul, _matmul_reference),
    with_terms(
        "grouped_matmul, transposed",
        _grouped_inputs,
        _matmul,
        _matmul_reference,
        transposed=True,
    ),
    with_terms("grouped_matmul, int8", _grouped_inputs, _matmul, _matmul_reference, store=_int8),
    with_terms("grouped_matmul, int4", _grouped_inputs, _matmul, _matmul_reference, store=_int4),
    Check("grouped_hidden", _grouped_inputs, _hidden, _hidden_reference),
    Check("grouped_weight_gradient", _grouped_inputs, _weight_gradient, _weight_gradient_reference),
)
_EXPERTS: tuple[Check, ...] = (
    Check("experts_pallas, with gradients", _experts_inputs, _experts, _experts_reference),
    Check("experts_pallas, int8", _experts_inputs, _experts_int8, _experts_int8_reference),
    Check(
        "experts_pallas, LoRA, with gradients",
        _experts_inputs,
        _experts_lora,
        _experts_lora_reference,
    ),
    Check(
        "experts_pallas in halves, with gradients",
        _experts_inputs,
        _experts_split,
        _experts_reference,
    ),
    Check(
        "experts_xla, with gradients",
        _experts_inputs,
        _experts_plain,
        _experts_reference,
        is_pallas=False,
    ),
    Check(
        "experts_xla, few rows",
        _few_rows,
        _experts_in_place,
        _experts_in_place_reference,
        is_pallas=False,
    ),
)
CHECKS = (*_GROUPED, *_EXPERTS)
