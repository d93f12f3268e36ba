"""The routed experts of int8 activations and int8 or int4 matrices, to serve: W8A8 and W4A8.

The matrices and their scales are those that are stored. A row has a scale, and a row of the hidden
layer one for each group of columns, made as they are multiplied, so that a row depends on no other.
Sums of products are integers up to the end of a group, then float32. On TPU by a kernel, elsewhere
the same mathematics in plain XLA.

Letters: R rows (tokens), C chosen experts of a row, D embed, F mlp, E experts, P slots.
"""

from typing import Any

import jax
import jax.numpy as jnp

from grok import hardware
from grok.ops.mlp import gated_activation
from grok.ops.moe.experts_pallas import combine, dispatch, group
from grok.ops.moe.experts_scaled import ScaledRows
from grok.ops.moe.grouped_matmul import grouped_matmul
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
    as of `pallas_call`; None: the kernel on TPU alone.
    """
    dtype = x.grad_slot.dtype
    layout, args = group(expert_ids_RC, w_gate_EDF.shape[0], interpret or False)
    is_kernel = interpret is not None or hardware.platform() == "tpu"

    def multiply(rows: Scaled, w_EKN: QuantizedArray) -> jax.Array:
        if not is_kernel:
            return _matmul_xla(rows, w_EKN, args["tiles_E"], args["tile"], dtype)
        return grouped_matmul((rows.values,), (w_EKN,), dtype=dtype, row_scales=rows.scales, **args)

    rows = Scaled(dispatch(x.values, layout), dispatch(x.scales, layout))
    with jax.named_scope("hidden"):
        gate_PF, up_PF = (multiply(rows, w) for w in (w_gate_EDF, w_up_EDF))
        hidden_PF = gated_activation(gate_PF, up_PF, activation)
        hidden = quantize_groups(hidden_PF, group_columns(hidden_PF.shape[1]), jnp.int8)
    with jax.named_scope("down"):
        y_PD = multiply(hidden, w_down_EFD)
    return combine(y_PD, layout, topk_weights_RC).astype(dtype)


def _matmul_xla(rows: Scaled, w_EKN: QuantizedArray, tiles_E, tile: int, dtype) -> jax.Array:
    """Each tile of rows times its expert's matrix, y_PN; slots after the last tile may hold
    anything."""

    def one_tile(expert, *tile_rows):
        w = w_EKN[expert]
        return scaled_product(Scaled(*tile_rows), Scaled(w.values, w.scales)).astype(dtype)

    return map_tiles(one_tile, tiles_E, tile, *rows)
