"""The routed experts on TPU: rows grouped by expert once, then products by kernels.

The same mathematics as `grok.ops.moe.experts_xla`, whose reference is this form's too. Shapes do
not depend on the routing: exact, nothing dropped, and at any imbalance the cost of the chosen
experts.

Letters: R rows (tokens), C chosen experts of a row, D embed, F mlp, E experts, P slots.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from grok.ops.mlp import gated_activation
from grok.ops.moe.grouped_hidden import grouped_hidden
from grok.ops.moe.grouped_matmul import grouped_matmul, grouped_weight_gradient
from grok.ops.moe.routing import GroupedLayout, group_by_expert
from grok.ops.moe.tiling import MlpSplits, kernel_tile_rows
from grok.ops.weights.lora import LoraArray
from grok.ops.weights.weight import Weight, adapter, base, is_plain


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def experts_pallas(
    x_RD,
    topk_weights_RC,
    expert_ids_RC,
    w_gate_EDF: Weight,
    w_up_EDF: Weight,
    w_down_EFD: Weight,
    down_is_column_major: bool = False,
    interpret: Any = False,
    activation: str = "gelu_tanh",
) -> jax.Array:
    """Sum over each row's experts of weight * expert(row), y_RD in the type of `x_RD`.

    `expert_ids_RC` int32 in [0, E), different within a row; `topk_weights_RC` float32. Products are
    summed in float32 and stored in the type of x. Gradients as of `experts_xla`.
    `down_is_column_major` states that the down matrix, gathered along its columns, has them major
    in memory; it is then read so, where XLA would write a copy for every layer. `interpret` as of
    `pallas_call`, to run without a TPU.
    """
    rows, matrices = (x_RD, topk_weights_RC, expert_ids_RC), (w_gate_EDF, w_up_EDF, w_down_EFD)
    options = down_is_column_major, interpret, activation
    return _experts(*rows, *matrices, *options, keep_products=False)[0]


def _experts(
    x_RD,
    topk_weights_RC,
    expert_ids_RC,
    w_gate_EDF,
    w_up_EDF,
    w_down_EFD,
    column_major,
    interpret,
    activation,
    keep_products=True,
):
    """y_RD, and the residuals: without the products the backward pass would compute two of three
    again."""
    layout, kernel_args = group(expert_ids_RC, w_gate_EDF.shape[0], interpret)
    x_PD = dispatch(x_RD, layout)
    hidden_PF, *products = _hidden(
        x_PD, w_gate_EDF, w_up_EDF, keep_products, activation, kernel_args
    )
    y_PD = _matmul_down(hidden_PF, w_down_EFD, False, column_major, kernel_args)
    y_RD = combine(y_PD, layout, topk_weights_RC).astype(x_RD.dtype)
    return y_RD, (x_RD, topk_weights_RC, layout, products, (w_gate_EDF, w_up_EDF, w_down_EFD))


def _backward(column_major, interpret, activation, residuals, dy_RD):
    x_RD, topk_weights_RC, layout, products, (w_gate_EDF, w_up_EDF, w_down_EFD) = residuals
    dtype = x_RD.dtype
    kernel_args = _kernel_args(topk_weights_RC, layout, interpret)
    dy_PD = dispatch(dy_RD.astype(dtype), layout)
    weight_P = weights_of_slots(topk_weights_RC, layout)
    dweight_P, dgate_PF, dup_PF, dw_down = _down_gradients(
        dy_PD, weight_P, products, w_down_EFD, column_major, activation, kernel_args
    )
    # Rows of x only after those of dy are used: both together need much memory.
    x_RD, dw_down = jax.lax.optimization_barrier((x_RD, dw_down))
    dx_PD, dw_gate, dw_up = _hidden_gradients(
        dispatch(x_RD, layout), dgate_PF, dup_PF, w_gate_EDF, w_up_EDF, kernel_args
    )
    dx_RD = combine(dx_PD, layout, jnp.ones_like(topk_weights_RC))
    return dx_RD.astype(dtype), dweight_P[layout.slot_RC], None, dw_gate, dw_up, dw_down


# Under remat the first pass is the function itself, and stores no residuals.
experts_pallas.defvjp(_experts, _backward, optimize_remat=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7, 8))
def experts_pallas_split_mlp(
    x_RD,
    topk_weights_RC,
    expert_ids_RC,
    shards: tuple[jax.Array, jax.Array, jax.Array],
    unshard: Callable,
    splits: MlpSplits,
    down_is_column_major: bool = False,
    interpret: Any = False,
    activation: str = "gelu_tanh",
) -> jax.Array:
    """As `experts_pallas` of the matrices `unshard(shards)`; every shard has all of its F.

    With gradients, one of `splits` parts of the width is after the other, in memory for one part
    of the matrices, their gradients and the intermediates, ordered so that collectives run beside
    products. Nothing is kept: the backward pass computes the hidden layer again.
    """
    rows = x_RD, topk_weights_RC, expert_ids_RC
    return experts_pallas(*rows, *unshard(shards), down_is_column_major, interpret, activation)


def _forward_split_mlp(
    x_RD, topk_weights_RC, expert_ids_RC, shards, unshard, splits, column_major, interpret, act
):
    layout, kernel_args = group(expert_ids_RC, shards[0].shape[0], interpret)
    x_PD, y_PD = dispatch(x_RD, layout), None
    for part in range(splits.forward):
        w_gate_EDF, w_up_EDF, w_down_EFD = unshard(mlp_part(shards, part, splits.forward))
        hidden_PF, *_ = _hidden(x_PD, w_gate_EDF, w_up_EDF, False, act, kernel_args)
        args = kernel_args | {"start": y_PD}
        y_PD = _matmul_down(hidden_PF, w_down_EFD, False, column_major, args)
        if part < splits.forward - 1:  # Several parts at once would need their memory.
            x_PD, y_PD = jax.lax.optimization_barrier((x_PD, y_PD))
    y_RD = combine(y_PD, layout, topk_weights_RC).astype(x_RD.dtype)
    return y_RD, (x_RD, topk_weights_RC, expert_ids_RC, shards)


def _backward_split_mlp(unshard, splits, column_major, interpret, activation, residuals, dy_RD):
    (x_RD, topk_weights_RC, expert_ids_RC, shards), splits = residuals, splits.backward
    layout, kernel_args = group(expert_ids_RC, shards[0].shape[0], interpret)
    dy_PD = dispatch(dy_RD.astype(x_RD.dtype), layout)
    weight_P = weights_of_slots(topk_weights_RC, layout)
    x_PD, dx_PD, dweight_P, dshards = None, None, jnp.zeros_like(weight_P), None
    for part in range(splits):
        take_part: Callable = functools.partial(mlp_part, part=part, splits=splits)
        matrices, pull = jax.vjp(lambda shards, take=take_part: unshard(take(shards)), shards)
        w_gate_EDF, w_up_EDF, w_down_EFD = matrices
        dhidden_PF = _matmul_down(dy_PD, w_down_EFD, True, column_major, kernel_args)
        if x_PD is None:  # Rows of x may still be on their way while those of dy are multiplied.
            x_RD, dhidden_PF = jax.lax.optimization_barrier((x_RD, dhidden_PF))
            x_PD = dispatch(x_RD, layout)
        _, *products = _hidden(x_PD, w_gate_EDF, w_up_EDF, True, activation, kernel_args)
        added_P, dgate_PF, dup_PF, weighted_PF = _product_gradients(
            dhidden_PF, weight_P, products, activation
        )
        dweight_P += added_P
        dx_PD = _row_gradients(dgate_PF, dup_PF, w_gate_EDF, w_up_EDF, kernel_args, dx_PD)
        if part == splits - 1:  # Gradients of rows travel while those of matrices are made.
            dx_RD = combine(dx_PD, layout, jnp.ones_like(topk_weights_RC)).astype(x_RD.dtype)
            products = dx_RD, dgate_PF, dup_PF
            dx_RD, dgate_PF, dup_PF = jax.lax.optimization_barrier(products)
        dw_gate = _weight_gradient(x_PD, dgate_PF, w_gate_EDF, kernel_args)
        dw_up = _weight_gradient(x_PD, dup_PF, w_up_EDF, kernel_args)
        dw_down = _weight_gradient(weighted_PF, dy_PD, w_down_EFD, kernel_args, column_major=True)
        (added,) = pull([dw_gate, dw_up, dw_down])
        dshards = added if dshards is None else jax.tree.map(jnp.add, dshards, added)
        if part < splits - 1:  # Several parts at once would need their memory.
            x_PD, dx_PD = jax.lax.optimization_barrier((x_PD, dx_PD))
    return dx_RD, dweight_P[layout.slot_RC], None, dshards


experts_pallas_split_mlp.defvjp(_forward_split_mlp, _backward_split_mlp)


def mlp_part(shards, part: int, splits: int):
    """A part of the width of sharded matrices."""
    w_gate_EDF, w_up_EDF, w_down_EFD = shards
    width = w_gate_EDF.shape[2] // splits
    here = slice(part * width, (part + 1) * width)
    return w_gate_EDF[:, :, here], w_up_EDF[:, :, here], w_down_EFD[:, here]


def group(expert_ids_RC, E: int, interpret) -> tuple[GroupedLayout, dict[str, Any]]:
    """The slots of the assignments, and the arguments that all kernels take."""
    layout = group_by_expert(expert_ids_RC, E)
    return layout, _kernel_args(expert_ids_RC, layout, interpret)


def _kernel_args(x_RC, layout: GroupedLayout, interpret) -> dict[str, Any]:
    (R, C), E = x_RC.shape, layout.tiles_E.size
    tile = kernel_tile_rows(R, C, E)
    return {"tiles_E": layout.tiles_E, "tile": tile, "max_tiles": R * C, "interpret": interpret}


@jax.named_scope("dispatch")
def dispatch(x_RD, layout: GroupedLayout) -> jax.Array:
    """Each assignment's row in its slot, and some row in empty ones, whose weight is 0."""
    C = layout.slot_RC.shape[1]
    row_P = jnp.minimum(layout.assignment_P // C, len(x_RD) - 1)
    return x_RD.at[row_P].get(mode="promise_in_bounds")


@jax.named_scope("combine")
def combine(y_PD, layout: GroupedLayout, weights_RC) -> jax.Array:
    """Sum over each row's slots, each times its weight, in float32."""
    terms = (
        y_PD.at[layout.slot_RC[:, c]].get(mode="promise_in_bounds").astype(jnp.float32)
        * weights_RC[:, c, None]
        for c in range(weights_RC.shape[1])
    )
    return functools.reduce(jnp.add, terms)


def weights_of_slots(topk_weights_RC, layout: GroupedLayout) -> jax.Array:
    """The weight of the assignment in each slot, 0 in empty ones."""
    return topk_weights_RC.reshape(-1).at[layout.assignment_P].get(mode="fill", fill_value=0)


@jax.named_scope("hidden")
def _hidden(x_PD, w_gate_EDF, w_up_EDF, keep_products: bool, activation: str, kernel_args):
    """hidden_PF, and with `keep_products` gate_PF and up_PF, all in the type of x."""
    act = functools.partial(gated_activation, activation=activation)
    if is_plain(w_gate_EDF) and is_plain(w_up_EDF):
        run: Callable = functools.partial(grouped_hidden, activation=act)
        return run(x_PD, w_gate_EDF, w_up_EDF, keep_products=keep_products, **kernel_args)
    gate_PF, up_PF = (
        _matmul([x_PD], [w], dtype=x_PD.dtype, **kernel_args) for w in (w_gate_EDF, w_up_EDF)
    )
    return act(gate_PF, up_PF).astype(x_PD.dtype), gate_PF, up_PF


@jax.named_scope("hidden_gradients")
def _hidden_gradients(x_PD, dgate_PF, dup_PF, w_gate_EDF, w_up_EDF, kernel_args):
    """Gradients of rows, and of the gate and up matrices."""
    dw_gate = _weight_gradient(x_PD, dgate_PF, w_gate_EDF, kernel_args)
    dw_up = _weight_gradient(x_PD, dup_PF, w_up_EDF, kernel_args)
    return _row_gradients(dgate_PF, dup_PF, w_gate_EDF, w_up_EDF, kernel_args), dw_gate, dw_up


def _row_gradients(dgate_PF, dup_PF, w_gate_EDF, w_up_EDF, kernel_args, start=None):
    """Gradients of rows, added to `start`."""
    xs, ws, options = [dgate_PF, dup_PF], [w_gate_EDF, w_up_EDF], kernel_args | {"start": start}
    return _matmul(xs, ws, dtype=dgate_PF.dtype, transposed=True, **options)


@jax.named_scope("down_gradients")
def _down_gradients(dy_PD, weight_P, products, w_down_EFD, column_major, activation, kernel_args):
    """Gradients of the weights, dweight_P, of the products gate_PF and up_PF, and of the down
    matrix; that of an expert's output is weight * dy."""
    dhidden_PF = _matmul_down(dy_PD, w_down_EFD, True, column_major, kernel_args)
    *gradients, weighted_PF = _product_gradients(dhidden_PF, weight_P, products, activation)
    dw_down = _weight_gradient(weighted_PF, dy_PD, w_down_EFD, kernel_args, column_major=True)
    return *gradients, dw_down


def _product_gradients(dhidden_PF, weight_P, products, activation: str):
    """Gradients of the weights, dweight_P, and of the products gate_PF and up_PF, and the hidden
    layer times the weights, in the type of the products."""
    dtype, dhidden_PF = dhidden_PF.dtype, dhidden_PF.astype(jnp.float32)
    act = functools.partial(gated_activation, activation=activation)
    hidden_PF, pull = jax.vjp(act, *products)
    dweight_P = jnp.sum(dhidden_PF * hidden_PF, axis=-1)
    dgate_PF, dup_PF = pull(dhidden_PF * weight_P[:, None])
    return dweight_P, dgate_PF, dup_PF, (hidden_PF * weight_P[:, None]).astype(dtype)


@jax.named_scope("down")
def _matmul_down(rows_P, w_down_EFD, transposed: bool, column_major: bool, kernel_args):
    """Rows times the down matrix of their expert, `transposed` or not."""
    if column_major and is_plain(w_down_EFD):
        w_down_EFD, transposed = jnp.swapaxes(w_down_EFD, 1, 2), not transposed
    return _matmul([rows_P], [w_down_EFD], dtype=rows_P.dtype, transposed=transposed, **kernel_args)


def _matmul(xs, ws, *, dtype, transposed: bool = False, **kernel_args) -> jax.Array:
    """Sum over pairs of rows and matrices of rows times the matrix of their expert."""
    run: Callable = functools.partial(grouped_matmul, **kernel_args, transposed=transposed)
    adapters = [(x, factors) for x, w in zip(xs, ws, strict=True) if (factors := adapter(w))]
    y = run(tuple(xs), tuple(map(base, ws)), dtype=jnp.float32 if adapters else dtype)
    for x, (a, b) in adapters:
        first, second = (b, a) if transposed else (a, b)
        y += run((run((x,), (first,), dtype=dtype),), (second,), dtype=jnp.float32)
    return y.astype(dtype)


def _weight_gradient(x, dy, w: Weight, kernel_args, *, column_major: bool = False) -> Weight:
    """Gradient of the sum of <dy, x w>, as `w` in structure; a LoraArray's base has none.

    With `column_major` the columns, which devices share, are major in memory: a sum of which each
    device keeps some columns would be made whole everywhere.
    """
    args = {name: kernel_args[name] for name in ("tiles_E", "tile", "interpret")}
    run: Callable = functools.partial(grouped_weight_gradient, **args)
    factors = adapter(w)
    if factors is None:
        if column_major:
            return jnp.swapaxes(run(dy, x, dtype=w.dtype), 1, 2)
        return run(x, dy, dtype=w.dtype)
    matmul: Callable = functools.partial(grouped_matmul, **kernel_args, dtype=x.dtype)
    a, b = factors
    da = run(x, matmul((dy,), (b,), transposed=True), dtype=a.dtype)
    db = run(matmul((x,), (a,)), dy, dtype=b.dtype)
    return LoraArray(None, da, db)
