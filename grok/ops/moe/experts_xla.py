"""The routed experts in plain XLA: y_r = sum over a row's experts of
weight * down(act(gate) * up).

Two forms of the same mathematics. `experts_reference` runs every expert on every row.
`experts_xla` runs each expert on its own rows only, a tile at a time: exact at any imbalance,
nothing dropped, at the cost of the chosen experts, and no buffer grows with the imbalance.

Letters: R rows (tokens), C chosen experts of a row, D embed, F mlp, E experts, M rows of a tile,
P = R*C + M slots of the assignments (a row and one of its experts) in order of expert.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from grok.ops.cpu import few_rows
from grok.ops.mlp import activate, gated_activation
from grok.ops.moe.cpu import ExpertSlice, for_each_tile, reads_in_place
from grok.ops.varying import pvary
from grok.ops.weights.weight import (
    Weight,
    matmul,
    matmul_transposed,
    take_expert,
    trainable_part,
    weight_gradient,
)


def expert_mlp(x_RD, w_gate_DF, w_up_DF, w_down_FD, activation="gelu_tanh") -> jax.Array:
    """One expert on rows: (act(x w_gate) * (x w_up)) w_down, summed in float32, y_RD float32."""
    hidden_RF = activate(matmul(w_gate_DF, x_RD), activation) * matmul(w_up_DF, x_RD)
    return matmul(w_down_FD, hidden_RF.astype(x_RD.dtype))


def expert_mlp_gradients(
    x_RD, weight_R, dy_RD, gate_RF, up_RF, w_gate_DF, w_up_DF, w_down_FD, activation="gelu_tanh"
):
    """Gradients of `weight * expert_mlp(x)` in float32: dx_RD, dweight_R, and those of the
    matrices.

    `gate_RF` is x w_gate and `up_RF` x w_up, in the type of x. The output is not needed, since
    <dy, h w_down> = <dy w_down^T, h>.
    """
    act = functools.partial(gated_activation, activation=activation)
    hidden_RF, pull = jax.vjp(act, gate_RF, up_RF)
    dy_RD = dy_RD.astype(x_RD.dtype)
    dhidden_RF = matmul_transposed(w_down_FD, dy_RD)
    dweight_R = jnp.sum(dhidden_RF * hidden_RF, axis=-1)
    dgate_RF, dup_RF = pull(dhidden_RF * weight_R[:, None])
    dx_RD = matmul_transposed(w_gate_DF, dgate_RF) + matmul_transposed(w_up_DF, dup_RF)
    weighted_RF = (hidden_RF * weight_R[:, None]).astype(x_RD.dtype)
    dmatrices = (
        weight_gradient(w_gate_DF, x_RD, dgate_RF),
        weight_gradient(w_up_DF, x_RD, dup_RF),
        weight_gradient(w_down_FD, weighted_RF, dy_RD),
    )
    return dx_RD, dweight_R, dmatrices


def experts_reference(
    x_RD,
    topk_weights_RC,
    expert_ids_RC,
    w_gate_EDF,
    w_up_EDF,
    w_down_EFD,
    activation="gelu_tanh",
):
    """Every expert on every row; arguments and result as of `experts_xla`."""
    one_expert = functools.partial(expert_mlp, activation=activation)
    mlp = jax.vmap(one_expert, in_axes=(None, 0, 0, 0))
    y_ERD = mlp(x_RD, w_gate_EDF, w_up_EDF, w_down_EFD)
    experts_E = jnp.arange(w_gate_EDF.shape[0])
    is_RCE = (expert_ids_RC[:, :, None] == experts_E[None, None, :]).astype(jnp.float32)
    return jnp.einsum("rce,erd->rd", is_RCE * topk_weights_RC[:, :, None], y_ERD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def experts_xla(
    x_RD,
    topk_weights_RC,
    expert_ids_RC,
    w_gate_EDF: Weight,
    w_up_EDF: Weight,
    w_down_EFD: Weight,
    tile: int,
    training_tiles: tuple[int, ...] = (),
    activation: str = "gelu_tanh",
) -> jax.Array:
    """Sum over each row's experts of weight * expert(row), y_RD in float32.

    `expert_ids_RC` int32; an id outside of [0, E) is an expert that is not here and adds nothing.
    `topk_weights_RC` is float32. Gradients flow to the rows, the weights and float matrices, of a
    LoraArray to its factors alone; int8 and stacked matrices serve the forward pass only.

    `tile` rows are multiplied at a time; see `grok.ops.moe.tiling`. Where gradients are wanted, an
    expert's rows are multiplied in tiles of the first of `training_tiles`, and the remainder in
    tiles of the next: little of a tile is empty, but a row's last bits may depend on the other
    rows, which otherwise they never do.
    """
    if few_rows.supports(len(x_RD), w_gate_EDF, w_up_EDF, w_down_EFD):
        rows = x_RD, topk_weights_RC, expert_ids_RC
        return few_rows.experts(*rows, w_gate_EDF, w_up_EDF, w_down_EFD, activation)
    E, C = w_gate_EDF.shape[0], expert_ids_RC.shape[1]
    order_P, start_E, count_E = _sort_by_expert(expert_ids_RC, E, tile)
    weights = topk_weights_RC.reshape(-1)
    one_expert: Callable = functools.partial(expert_mlp, activation=activation)

    def expert(y_RD, e):
        matrices = [
            _expert_matrix(w, e, x_RD.dtype, tile) for w in (w_gate_EDF, w_up_EDF, w_down_EFD)
        ]

        def one_tile(_, assignments, y_RD):
            y_MD = one_expert(_take(x_RD, assignments // C), *matrices)
            rows = assignments // C
            return y_RD.at[rows].add(y_MD * _take(weights, assignments)[:, None], mode="drop")

        return for_each_tile(one_tile, y_RD, order_P, start_E[e], count_E[e], (tile,))

    return _for_each_expert(expert, _zeros(x_RD.shape), count_E)


def _forward(
    x_RD, topk_weights_RC, expert_ids_RC, w_gate_EDF, w_up_EDF, w_down_EFD, tile, tiles, activation
):
    """y_RD, and the residuals: also the products of all assignments in order of their expert, which
    cost less to store than to compute again."""
    E, C = w_gate_EDF.shape[0], expert_ids_RC.shape[1]
    tiles = tiles or (tile,)
    order_P, start_E, count_E = _sort_by_expert(expert_ids_RC, E, tiles[0])
    weights = topk_weights_RC.reshape(-1)

    def expert(carry, e):
        gate_DF, up_DF, down_FD = w_gate_EDF[e], w_up_EDF[e], w_down_EFD[e]

        def one_tile(slot, assignments, carry):
            y_RD, *products = carry
            x_MD = _take(x_RD, assignments // C)
            tile_products = matmul(gate_DF, x_MD), matmul(up_DF, x_MD)
            # Rows past an expert's end are the next one's, who writes them after it.
            products = [
                jax.lax.dynamic_update_slice(all_PF, tile_MF.astype(x_RD.dtype), (slot, 0))
                for all_PF, tile_MF in zip(products, tile_products, strict=True)
            ]
            hidden_MF = gated_activation(*tile_products, activation).astype(x_RD.dtype)
            y_MD = matmul(down_FD, hidden_MF)
            y_MD *= _take(weights, assignments)[:, None]
            return y_RD.at[assignments // C].add(y_MD, mode="drop"), *products

        return for_each_tile(one_tile, carry, order_P, start_E[e], count_E[e], tiles)

    shape = len(order_P), w_gate_EDF.shape[2]
    products = [_zeros(shape, x_RD.dtype) for _ in range(2)]
    y_RD, *products = _for_each_expert(expert, (_zeros(x_RD.shape), *products), count_E)
    return y_RD, (x_RD, topk_weights_RC, expert_ids_RC, products, w_gate_EDF, w_up_EDF, w_down_EFD)


def _backward(tile, tiles, activation, residuals, dy_RD):
    x_RD, topk_weights_RC, expert_ids_RC, products, *matrices_E = residuals
    E, (R, C) = matrices_E[0].shape[0], expert_ids_RC.shape
    tiles = tiles or (tile,)
    order_P, start_E, count_E = _sort_by_expert(expert_ids_RC, E, tiles[0])
    weights = topk_weights_RC.reshape(-1)
    gradients: Callable = functools.partial(expert_mlp_gradients, activation=activation)

    def expert(carry, e):
        matrices = [w[e] for w in matrices_E]

        def one_tile(slot, assignments, carry):
            dx_RD, dweights, dmatrices = carry
            rows = assignments // C
            tile_products = (
                jax.lax.dynamic_slice_in_dim(all_PF, slot, len(rows)) for all_PF in products
            )
            dx_MD, dweight_M, dtile = gradients(
                _take(x_RD, rows),
                _take(weights, assignments),
                _take(dy_RD, rows),
                *tile_products,
                *matrices,
            )
            return (
                dx_RD.at[rows].add(dx_MD, mode="drop"),
                dweights.at[assignments].add(dweight_M, mode="drop"),
                jax.tree.map(jnp.add, dmatrices, dtile),
            )

        trainable = tuple(map(trainable_part, matrices))
        carry = (*carry, jax.tree.map(lambda w: _zeros(w.shape), trainable))
        carry = for_each_tile(one_tile, carry, order_P, start_E[e], count_E[e], tiles)
        dx_RD, dweights, dmatrices = carry
        return (dx_RD, dweights), jax.tree.map(lambda d, w: d.astype(w.dtype), dmatrices, trainable)

    carry = (_zeros(x_RD.shape), _zeros((R * C,)))
    (dx_RD, dweights), dmatrices_E = jax.lax.scan(expert, carry, jnp.arange(E))
    return dx_RD.astype(x_RD.dtype), dweights.reshape(R, C), None, *dmatrices_E


# Under remat the first pass is the function itself, and stores no residuals.
experts_xla.defvjp(_forward, _backward, optimize_remat=True)


def _sort_by_expert(expert_ids_RC, num_experts, tile):
    """Assignments in order of expert, as indices into the flat (R*C), one tile of padding.

    Returns order_P (padding holds R*C, past the end), start_E and count_E.
    """
    ids = expert_ids_RC.reshape(-1)
    is_here = (ids >= 0) & (ids < num_experts)
    ids = jnp.where(is_here, ids, num_experts)
    order = jnp.argsort(ids, stable=True).astype(jnp.int32)
    order_P = jnp.concatenate([order, jnp.full((tile,), ids.size, jnp.int32)])
    count_E = jnp.sum(ids[:, None] == jnp.arange(num_experts)[None, :], axis=0, dtype=jnp.int32)
    return order_P, jnp.cumsum(count_E) - count_E, count_E


def _for_each_expert(body, carry, count_E):
    """Runs body(carry, e) for each expert that has rows."""

    def one_expert(e, carry):
        return jax.lax.cond(count_E[e] > 0, lambda c: body(c, e), lambda c: c, carry)

    return jax.lax.fori_loop(0, count_E.shape[0], one_expert, carry)


def _expert_matrix(w, e, dtype, tile: int) -> Weight:
    """One expert's matrix as floats, or to be read in place."""
    return ExpertSlice(w, e) if reads_in_place(w, tile) else take_expert(w, e, dtype)


def _take(x, indices):
    """Rows of `x`; zeros for indices past the end."""
    return x.at[indices].get(mode="fill", fill_value=0)


def _zeros(shape, dtype=jnp.float32):
    """Zeros to add to; typed, like what is added, as varying over devices."""
    return pvary(jnp.zeros(shape, dtype))
