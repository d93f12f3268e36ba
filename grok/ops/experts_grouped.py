"""The routed experts on TPU: rows sorted by expert once, then products by kernels.

The same mathematics as `grok.ops.experts`, whose reference is this form's too. Shapes do not depend
on the routing: exact, nothing dropped, and at any imbalance the cost of the chosen experts.

Letters: R rows (tokens), C chosen experts of a row, D embed, F mlp, E experts, P places of pairs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from grok.ops.experts import Weight, gelu
from grok.ops.grouped_matmul import grouped_matmul, grouped_weight_gradient
from grok.ops.lora import LoraArray
from grok.ops.places import Places, place, tile_rows
from grok.ops.quant import QuantizedArray


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def experts_grouped(
    x_RD: jax.Array,
    gate_RC: jax.Array,
    chosen_RC: jax.Array,
    w_gate_EDF: Weight | QuantizedArray,
    w_up_EDF: Weight | QuantizedArray,
    w_down_EFD: Weight | QuantizedArray,
    interpret: Any = False,
) -> jax.Array:
    """Sum over each row's chosen experts of gate * expert(row), y_RD in the type of `x_RD`.

    `chosen_RC` int32 in [0, E), different within a row; `gate_RC` float32. Products are summed in
    float32 and kept in the type of x. Gradients as of `experts_tiled`. `interpret` runs the
    kernels without a TPU, as `pallas_call` has it.
    """
    return _forward(x_RD, gate_RC, chosen_RC, w_gate_EDF, w_up_EDF, w_down_EFD, interpret)[0]


def _forward(x_RD, gate_RC, chosen_RC, w_gate_EDF, w_up_EDF, w_down_EFD, interpret):
    (R, C), E = chosen_RC.shape, w_gate_EDF.shape[0]
    places = place(chosen_RC, E)
    tiles = {"tiles_E": places.tiles_E, "tile": tile_rows(R, C, E), "interpret": interpret}
    times: Callable = functools.partial(_times, **tiles, dtype=x_RD.dtype)
    x_PD = _spread(x_RD, places)
    branch_PF, up_PF = times([x_PD], [w_gate_EDF]), times([x_PD], [w_up_EDF])
    y_PD = times([_hidden(branch_PF, up_PF).astype(x_RD.dtype)], [w_down_EFD])
    y_RD = _joined(y_PD, places, gate_RC).astype(x_RD.dtype)
    weights = w_gate_EDF, w_up_EDF, w_down_EFD
    # The products are kept for backward, which would otherwise compute two of three again.
    return y_RD, (x_RD, gate_RC, places, branch_PF, up_PF, weights)


def _backward(interpret, saved, dy_RD):
    x_RD, gate_RC, places, branch_PF, up_PF, weights = saved
    w_gate_EDF, w_up_EDF, w_down_EFD = weights
    (R, C), E, dtype = gate_RC.shape, w_gate_EDF.shape[0], x_RD.dtype
    tiles = {"tiles_E": places.tiles_E, "tile": tile_rows(R, C, E), "interpret": interpret}
    times: Callable = functools.partial(_times, **tiles, dtype=dtype)
    gradient: Callable = functools.partial(_gradient, **tiles)

    dy_PD = _spread(dy_RD.astype(dtype), places)
    dhidden_PF = times([dy_PD], [w_down_EFD], transposed=True).astype(jnp.float32)
    hidden_PF, pull = jax.vjp(_hidden, branch_PF, up_PF)
    gate_P = gate_RC.reshape(-1).at[places.pair_P].get(mode="fill", fill_value=0)
    dgate_RC = jnp.sum(dhidden_PF * hidden_PF, axis=-1)[places.place_RC]
    dbranch_PF, dup_PF = pull(dhidden_PF * gate_P[:, None])
    scaled_PF = (hidden_PF * gate_P[:, None]).astype(dtype)
    dw_down = gradient(scaled_PF, dy_PD, w_down_EFD, embed_first=True)
    # Rows of x only after those of dy are done with: memory for both is much.
    x_RD, dw_down = jax.lax.optimization_barrier((x_RD, dw_down))
    x_PD = _spread(x_RD, places)
    dw_gate, dw_up = gradient(x_PD, dbranch_PF, w_gate_EDF), gradient(x_PD, dup_PF, w_up_EDF)
    dx_PD = times([dbranch_PF, dup_PF], [w_gate_EDF, w_up_EDF], transposed=True)
    dx_RD = _joined(dx_PD, places, jnp.ones_like(gate_RC))
    return dx_RD.astype(dtype), dgate_RC, None, dw_gate, dw_up, dw_down


experts_grouped.defvjp(_forward, _backward)


def _hidden(branch_PF, up_PF) -> jax.Array:
    """gelu(branch) * up in float32."""
    return gelu(branch_PF.astype(jnp.float32)) * up_PF.astype(jnp.float32)


def _spread(x_RD, places: Places) -> jax.Array:
    """Each pair's row at its place, and some row where there is none: its gate is 0 there."""
    rows_P = jnp.minimum(places.pair_P // places.place_RC.shape[1], len(x_RD) - 1)
    return x_RD.at[rows_P].get(mode="promise_in_bounds")


def _joined(y_PD, places: Places, factor_RC) -> jax.Array:
    """Sum of what lies at a row's places, each times its factor, in float32."""
    parts = (
        y_PD.at[places.place_RC[:, c]].get(mode="promise_in_bounds").astype(jnp.float32)
        * factor_RC[:, c, None]
        for c in range(factor_RC.shape[1])
    )
    return functools.reduce(jnp.add, parts)


def _times(xs, ws, *, dtype, transposed: bool = False, **tiles) -> jax.Array:
    """Sum of rows times the matrix of their expert, `transposed` or not, over pairs of both."""
    run: Callable = functools.partial(grouped_matmul, **tiles, transposed=transposed)
    bases = tuple(w.base if isinstance(w, LoraArray) else w for w in ws)
    adapted = [(x, w) for x, w in zip(xs, ws, strict=True) if isinstance(w, LoraArray)]
    y = run(tuple(xs), bases, dtype=jnp.float32 if adapted else dtype)
    for x, w in adapted:
        first, second = (w.b, w.a) if transposed else (w.a, w.b)
        y += run((run((x,), (first,), dtype=dtype),), (second,), dtype=jnp.float32)
    return y.astype(dtype)


def _gradient(x, dy, w: Weight, *, embed_first: bool = False, **tiles) -> Weight:
    """Gradient of the sum of <dy, x w>, as `w` in structure; a LoraArray's base has none.

    With `embed_first` the columns, which are those that devices share, lie first in memory: a sum
    of which each device keeps some columns would be made whole everywhere.
    """
    run: Callable = functools.partial(grouped_weight_gradient, **tiles)
    if not isinstance(w, LoraArray):
        if embed_first:
            return jnp.swapaxes(run(dy, x, dtype=w.dtype), 1, 2)
        return run(x, dy, dtype=w.dtype)
    times: Callable = functools.partial(grouped_matmul, **tiles, dtype=x.dtype)
    da = run(x, times((dy,), (w.b,), transposed=True), dtype=w.a.dtype)
    db = run(times((x,), (w.a,)), dy, dtype=w.b.dtype)
    return LoraArray(None, da, db)
