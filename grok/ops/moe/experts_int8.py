"""The routed experts of int8 activations and int8 or int4 matrices, to serve: W8A8 and W4A8.

The matrices and their scales are those that are stored. A row has a scale, and a row of the hidden
layer one for each group of columns, made as they are multiplied, so that a row depends on no other.
Sums of products are integers up to the end of a group, then float32. On TPU by kernels, elsewhere
the same mathematics in plain XLA.

Letters: R rows (tokens), C chosen experts of a row, D embed, F mlp, E experts, P slots.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from grok import hardware
from grok.ops.mlp import gated_activation
from grok.ops.moe.experts_pallas import combine, dispatch, group
from grok.ops.moe.experts_scaled import ScaledRows
from grok.ops.moe.grouped_matmul import grouped_matmul
from grok.ops.moe.scaled_hidden import scaled_hidden
from grok.ops.moe.scaled_matmul import map_tiles
from grok.ops.scaled import Scaled, group_columns, quantize_groups, scaled_product
from grok.ops.weights.quantized import QuantizedArray


def experts_int8(
    x: ScaledRows,
    topk_weights_RC: jax.Array,
    expert_ids_RC: jax.Array,
    w_gate_EDF: QuantizedArray,
    w_up_EDF: QuantizedArray,
    w_down_EFD: QuantizedArray,
    activation: str = "gelu_tanh",
    interpret: Any = None,
) -> jax.Array:
    """Sum over each row's experts of weight * expert(row), y_RD in the type of computation.

    `expert_ids_RC` int32 in [0, E), different within a row; `topk_weights_RC` float32. `interpret`
    as of `pallas_call`; None: kernels on TPU alone.
    """
    dtype = x.grad_slot.dtype
    layout, args = group(expert_ids_RC, w_gate_EDF.shape[0], interpret or False)
    is_kernel = interpret is not None or hardware.platform() == "tpu"

    matrices = w_gate_EDF, w_up_EDF, w_down_EFD
    rows = Scaled(dispatch(x.values, layout), dispatch(x.scales, layout))
    act = functools.partial(gated_activation, activation=activation)
    if is_kernel:
        y_PD = _experts(rows, *matrices, act, dtype, args)
    else:
        y_PD = _experts_xla(rows, *matrices, act, dtype, args["tiles_E"], args["tile"])
    return combine(y_PD, layout, topk_weights_RC).astype(dtype)


def _experts(x: Scaled, gate, up, down, act: Callable, dtype, args: dict[str, Any]) -> jax.Array:
    """The expert of each slot, y_PD, by kernels."""
    with jax.named_scope("hidden"):
        hidden = scaled_hidden(x, gate, up, dtype=dtype, activation=act, **args)
    with jax.named_scope("down"):
        options = {"dtype": dtype, "row_scales": hidden.scales} | args
        return grouped_matmul((hidden.values,), (down,), **options)


def _experts_xla(x: Scaled, gate, up, down, act: Callable, dtype, tiles_E, tile: int) -> jax.Array:
    """The same in plain XLA; slots after the last tile may hold anything."""

    def product(rows: Scaled, w: QuantizedArray) -> jax.Array:
        return scaled_product(rows, Scaled(w.values, w.scales)).astype(dtype)

    def one_tile(expert, *tile_rows):
        hidden = act(*(product(Scaled(*tile_rows), w[expert]) for w in (gate, up)))
        rows = quantize_groups(hidden, group_columns(hidden.shape[1]), jnp.int8)
        return product(rows, down[expert])

    return map_tiles(one_tile, tiles_E, tile, *x)
