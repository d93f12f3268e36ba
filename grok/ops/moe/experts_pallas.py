"""The routed experts on TPU: rows sorted by expert once, then products by kernels.

The same mathematics as `grok.ops.moe.experts_xla`, whose reference is this form's too. Shapes do
not depend on the routing: exact, nothing dropped, and at any imbalance the cost of the chosen
experts.

Letters: R rows (tokens), C chosen experts of a row, D embed, F mlp, E experts, P places of pairs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from grok import sharding
from grok.ops.moe.experts_xla import Weight, join
from grok.ops.moe.grouped_hidden import grouped_hidden
from grok.ops.moe.grouped_matmul import grouped_matmul, grouped_weight_gradient
from grok.ops.moe.routing import Places, place, tile_rows
from grok.ops.weights.int8 import QuantizedArray
from grok.ops.weights.lora import LoraArray

# Parts of the width of the experts, one after the other, where memory is little.
PARTS = 2


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
    places, tiles = _tiled(chosen_RC, w_gate_EDF, interpret)
    hidden_PF, *_ = _hidden_layer(_spread(x_RD, places), w_gate_EDF, w_up_EDF, False, tiles)
    y_PD = _down(hidden_PF, w_down_EFD, False, tiles)
    return _joined(y_PD, places, gate_RC).astype(x_RD.dtype)


def _forward(x_RD, gate_RC, chosen_RC, w_gate_EDF, w_up_EDF, w_down_EFD, interpret):
    places, tiles = _tiled(chosen_RC, w_gate_EDF, interpret)
    x_PD = _spread(x_RD, places)
    hidden_PF, branch_PF, up_PF = _hidden_layer(x_PD, w_gate_EDF, w_up_EDF, True, tiles)
    y_RD = _joined(_down(hidden_PF, w_down_EFD, False, tiles), places, gate_RC).astype(x_RD.dtype)
    weights = w_gate_EDF, w_up_EDF, w_down_EFD
    # The products are kept for backward, which would otherwise compute two of three again.
    return y_RD, (x_RD, gate_RC, places, branch_PF, up_PF, weights)


def _backward(interpret, saved, dy_RD):
    x_RD, gate_RC, places, branch_PF, up_PF, weights = saved
    w_gate_EDF, w_up_EDF, w_down_EFD = weights
    dtype = x_RD.dtype
    tiles = _tiles(gate_RC, places, interpret)
    dy_PD = _spread(dy_RD.astype(dtype), places)
    gate_P = _gates(gate_RC, places)
    dgate_P, dbranch_PF, dup_PF, dw_down = _down_gradients(
        dy_PD, gate_P, branch_PF, up_PF, w_down_EFD, tiles
    )
    # Rows of x only after those of dy are done with: memory for both is much.
    x_RD, dw_down = jax.lax.optimization_barrier((x_RD, dw_down))
    dx_PD, dw_gate, dw_up = _hidden_gradients(
        _spread(x_RD, places), dbranch_PF, dup_PF, w_gate_EDF, w_up_EDF, tiles
    )
    dx_RD = _joined(dx_PD, places, jnp.ones_like(gate_RC))
    return dx_RD.astype(dtype), dgate_P[places.place_RC], None, dw_gate, dw_up, dw_down


# Under remat the first pass is the function itself, and nothing is written for a backward pass.
experts_grouped.defvjp(_forward, _backward, optimize_remat=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def experts_in_parts(
    x_RD: jax.Array,
    gate_RC: jax.Array,
    chosen_RC: jax.Array,
    shards: tuple[jax.Array, jax.Array, jax.Array],
    collect: Callable,
    interpret: Any = False,
) -> jax.Array:
    """As `experts_grouped` of the matrices that `collect` makes of `shards`, with F of each in it.

    Nothing is kept for the backward pass, which computes the hidden layer again, one half of its
    width after the other: matrices, their gradients, and all between them are half as large there.
    """
    return experts_grouped(x_RD, gate_RC, chosen_RC, *collect(shards), interpret)


def _forward_whole(x_RD, gate_RC, chosen_RC, shards, collect, interpret):
    y_RD = experts_in_parts(x_RD, gate_RC, chosen_RC, shards, collect, interpret)
    return y_RD, (x_RD, gate_RC, chosen_RC, shards)


def _backward_in_parts(collect, interpret, saved, dy_RD):
    x_RD, gate_RC, chosen_RC, shards = saved
    places, tiles = _tiled(chosen_RC, shards[0], interpret)
    x_PD, dy_PD = _spread(x_RD, places), _spread(dy_RD.astype(x_RD.dtype), places)
    gate_P = _gates(gate_RC, places)
    dx_PD, dgate_P, dshards = None, jnp.zeros_like(gate_P), None
    for part in range(PARTS):
        if dx_PD is not None:  # Not both parts at once, which is what takes half of the memory.
            x_PD, dx_PD = jax.lax.optimization_barrier((x_PD, dx_PD))
        cut: Callable = functools.partial(_part, part=part)
        weights, pull = jax.vjp(lambda shards, cut=cut: collect(cut(shards)), shards)
        w_gate_EDF, w_up_EDF, w_down_EFD = weights
        _, branch_PF, up_PF = _hidden_layer(x_PD, w_gate_EDF, w_up_EDF, True, tiles)
        more_P, dbranch_PF, dup_PF, dw_down = _down_gradients(
            dy_PD, gate_P, branch_PF, up_PF, w_down_EFD, tiles
        )
        dx_PD, dw_gate, dw_up = _hidden_gradients(
            x_PD, dbranch_PF, dup_PF, w_gate_EDF, w_up_EDF, tiles, dx_PD
        )
        dgate_P += more_P
        (more,) = pull([dw_gate, dw_up, dw_down])
        dshards = more if dshards is None else jax.tree.map(jnp.add, dshards, more)
    dx_RD = _joined(dx_PD, places, jnp.ones_like(gate_RC))
    return dx_RD.astype(x_RD.dtype), dgate_P[places.place_RC], None, dshards


experts_in_parts.defvjp(_forward_whole, _backward_in_parts)


def _part(shards, part: int):
    """A half of the width of matrices that are in shards."""
    w_gate_EDF, w_up_EDF, w_down_EFD = shards
    width = w_gate_EDF.shape[2] // PARTS
    half = slice(part * width, (part + 1) * width)
    return w_gate_EDF[:, :, half], w_up_EDF[:, :, half], w_down_EFD[:, half]


def _tiled(chosen_RC, w_gate_EDF, interpret) -> tuple[Places, dict[str, Any]]:
    """Where the pairs of rows and experts lie, and what kernels have to know of it."""
    places = place(chosen_RC, w_gate_EDF.shape[0])
    return places, _tiles(chosen_RC, places, interpret)


def _tiles(pairs_RC, places: Places, interpret) -> dict[str, Any]:
    """What kernels have to know of the places of so many pairs."""
    (R, C), E = pairs_RC.shape, places.tiles_E.size
    return {
        "tiles_E": places.tiles_E,
        "tile": tile_rows(R, C, E),
        "most": R * C,
        "interpret": interpret,
    }


def _gates(gate_RC, places: Places) -> jax.Array:
    """The gate of the pair at each place, 0 where there is none."""
    return gate_RC.reshape(-1).at[places.pair_P].get(mode="fill", fill_value=0)


def _down_gradients(dy_PD, gate_P, branch_PF, up_PF, w_down_EFD, tiles):
    """Gradients of gates, dgate_P, of both products of the hidden layer, and of the down matrix,
    where those of what the experts gave before their gates are gate * dy."""
    dhidden_PF = _down(dy_PD, w_down_EFD, True, tiles).astype(jnp.float32)
    hidden_PF, pull = jax.vjp(join, branch_PF, up_PF)
    dgate_P = jnp.sum(dhidden_PF * hidden_PF, axis=-1)
    dbranch_PF, dup_PF = pull(dhidden_PF * gate_P[:, None])
    scaled_PF = (hidden_PF * gate_P[:, None]).astype(dy_PD.dtype)
    dw_down = _gradient(scaled_PF, dy_PD, w_down_EFD, tiles, embed_first=True)
    return dgate_P, dbranch_PF, dup_PF, dw_down


def _hidden_gradients(x_PD, dbranch_PF, dup_PF, w_gate_EDF, w_up_EDF, tiles, start=None):
    """Gradients of rows, added to `start`, and of the hidden layer's matrices."""
    dw_gate = _gradient(x_PD, dbranch_PF, w_gate_EDF, tiles)
    dw_up = _gradient(x_PD, dup_PF, w_up_EDF, tiles)
    both = [dbranch_PF, dup_PF], [w_gate_EDF, w_up_EDF]
    if start is not None:
        tiles = tiles | {"start": start}
    return _times(*both, dtype=x_PD.dtype, transposed=True, **tiles), dw_gate, dw_up


def _hidden_layer(x_PD, w_gate_EDF, w_up_EDF, products: bool, tiles) -> tuple[jax.Array, ...]:
    """hidden_PF, and with `products` branch_PF and up_PF, that it was made of, in the type of x."""
    if isinstance(w_gate_EDF, jax.Array) and isinstance(w_up_EDF, jax.Array):
        both = w_gate_EDF, w_up_EDF
        return grouped_hidden(x_PD, *both, join=join, products=products, **tiles)
    branch_PF, up_PF = (
        _times([x_PD], [w], dtype=x_PD.dtype, **tiles) for w in (w_gate_EDF, w_up_EDF)
    )
    return join(branch_PF, up_PF).astype(x_PD.dtype), branch_PF, up_PF


def _down(rows_P, w_down_EFD, transposed: bool, tiles) -> jax.Array:
    """Rows times the down matrix of their expert, `transposed` or not.

    What is collected from other devices along its columns has them first in memory, and is read
    so: its copy would be written for every layer.
    """
    if sharding.axis_size("fsdp_embed") > 1 and isinstance(w_down_EFD, jax.Array):
        w_down_EFD, transposed = jnp.swapaxes(w_down_EFD, 1, 2), not transposed
    return _times([rows_P], [w_down_EFD], dtype=rows_P.dtype, transposed=transposed, **tiles)


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


def _gradient(x, dy, w: Weight, tiles, *, embed_first: bool = False) -> Weight:
    """Gradient of the sum of <dy, x w>, as `w` in structure; a LoraArray's base has none.

    With `embed_first` the columns, which are those that devices share, lie first in memory: a sum
    of which each device keeps some columns would be made whole everywhere.
    """
    places = {name: tiles[name] for name in ("tiles_E", "tile", "interpret")}
    run: Callable = functools.partial(grouped_weight_gradient, **places)
    if not isinstance(w, LoraArray):
        if embed_first:
            return jnp.swapaxes(run(dy, x, dtype=w.dtype), 1, 2)
        return run(x, dy, dtype=w.dtype)
    times: Callable = functools.partial(grouped_matmul, **tiles, dtype=x.dtype)
    da = run(x, times((dy,), (w.b,), transposed=True), dtype=w.a.dtype)
    db = run(times((x,), (w.a,)), dy, dtype=w.b.dtype)
    return LoraArray(None, da, db)
