"""The routed experts: y_r = sum over a row's chosen experts of gate * down(gelu(gate_up) * up).

Two forms of the same mathematics. `experts_reference` runs every expert on every row.
`experts_tiled` runs each expert on its own rows only, a tile at a time: exact at any imbalance,
nothing dropped, its cost that of the chosen experts, and no buffer grows with the imbalance.

Letters: R rows (tokens), C chosen experts of a row, D embed, F mlp, E experts, M rows of a tile.
"""

import functools

import jax
import jax.numpy as jnp

from grok import hardware, sharding
from grok.ops.weights.int8 import QuantizedArray
from grok.ops.weights.layer_slice import InPlace, StackedArray, product_in_place
from grok.ops.weights.lora import (
    LoraArray,
    product,
    product_transposed,
    trained_part,
    weight_gradient,
)

Weight = jax.Array | LoraArray
# Rows up to which reading a matrix where it lies is faster than to copy and multiply it.
FEW = 8


def gelu(x: jax.Array) -> jax.Array:
    """GELU in its tanh approximation (Hendrycks & Gimpel 2016, section 2), as the release's."""
    return jax.nn.gelu(x, approximate=True)


def expert_mlp(
    x_RD: jax.Array,
    w_gate_DF: Weight | InPlace,
    w_up_DF: Weight | InPlace,
    w_down_FD: Weight | InPlace,
) -> jax.Array:
    """One expert on rows: (gelu(x w_gate) * (x w_up)) w_down, summed in float32, y_RD float32."""

    def times(x, w):
        return product_in_place(x, w) if isinstance(w, InPlace) else product(x, w)

    hidden_RF = gelu(times(x_RD, w_gate_DF)) * times(x_RD, w_up_DF)
    return times(hidden_RF.astype(x_RD.dtype), w_down_FD)


def join(branch_RF: jax.Array, up_RF: jax.Array) -> jax.Array:
    """gelu(branch) * up in float32."""
    return gelu(branch_RF.astype(jnp.float32)) * up_RF.astype(jnp.float32)


def expert_mlp_gradients(x_RD, gate_R, dy_RD, branch_RF, up_RF, w_gate_DF, w_up_DF, w_down_FD):
    """Gradients of `gate * expert_mlp(x)` in float32: dx_RD, dgate_R, and those of the weights.

    `branch_RF` is x w_gate and `up_RF` x w_up, in the type of x. The output is not needed, since
    <dy, h w_down> = <dy w_down^T, h>.
    """
    hidden_RF, pull = jax.vjp(join, branch_RF, up_RF)
    dy_RD = dy_RD.astype(x_RD.dtype)
    dhidden_RF = product_transposed(dy_RD, w_down_FD)
    dgate_R = jnp.sum(dhidden_RF * hidden_RF, axis=-1)
    dbranch_RF, dup_RF = pull(dhidden_RF * gate_R[:, None])
    dx_RD = product_transposed(dbranch_RF, w_gate_DF) + product_transposed(dup_RF, w_up_DF)
    scaled_RF = (hidden_RF * gate_R[:, None]).astype(x_RD.dtype)
    dweights = (
        weight_gradient(x_RD, dbranch_RF, w_gate_DF),
        weight_gradient(x_RD, dup_RF, w_up_DF),
        weight_gradient(scaled_RF, dy_RD, w_down_FD),
    )
    return dx_RD, dgate_R, dweights


def experts_reference(x_RD, gate_RC, chosen_RC, w_gate_EDF, w_up_EDF, w_down_EFD):
    """Every expert on every row; arguments and result as of `experts_tiled`."""
    mlp = jax.vmap(expert_mlp, in_axes=(None, 0, 0, 0))
    every_ERD = mlp(x_RD, w_gate_EDF, w_up_EDF, w_down_EFD)
    experts_E = jnp.arange(w_gate_EDF.shape[0])
    share_RCE = (chosen_RC[:, :, None] == experts_E[None, None, :]) * gate_RC[:, :, None]
    return jnp.einsum("rce,erd->rd", share_RCE, every_ERD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def experts_tiled(
    x_RD: jax.Array,
    gate_RC: jax.Array,
    chosen_RC: jax.Array,
    w_gate_EDF: Weight | QuantizedArray | StackedArray,
    w_up_EDF: Weight | QuantizedArray | StackedArray,
    w_down_EFD: Weight | QuantizedArray | StackedArray,
    tile: int,
    tiles: tuple[int, ...] = (),
) -> jax.Array:
    """Sum over each row's chosen experts of gate * expert(row), y_RD in float32.

    `chosen_RC` int32 holds experts in [0, E); a value outside is an expert that is not here and
    adds nothing. `gate_RC` is float32. Gradients flow to the rows, the gates and float weights, of
    a LoraArray to its factors alone; int8 and stacked weights serve the forward pass only.
    `tile` rows are multiplied at a time; see `tile_rows`. On CPU up to FEW rows read the weights
    of a layer of many in place. Where gradients are wanted, an expert's rows are multiplied as many
    at a time as the first of `tiles` says, and what is left as the next says: little of a tile is
    empty, but a row's last bits may depend on the other rows, which otherwise they never do.
    """
    E, C = w_gate_EDF.shape[0], chosen_RC.shape[1]
    order, start_E, count_E = _sorted_assignments(chosen_RC, E, tile)
    gate = gate_RC.reshape(-1)

    def expert(y_RD, e):
        matrices = w_gate_EDF, w_up_EDF, w_down_EFD
        weights = [_expert(w, e, x_RD.dtype, tile) for w in matrices]

        def one_tile(_, pairs, y_RD):
            y_MD = expert_mlp(_take(x_RD, pairs // C), *weights)
            return y_RD.at[pairs // C].add(y_MD * _take(gate, pairs)[:, None], mode="drop")

        return for_each_tile(one_tile, y_RD, order, start_E[e], count_E[e], (tile,))

    return _for_each_expert(expert, _zeros(x_RD.shape), count_E)


def tile_rows(assignments: int, num_experts: int) -> int:
    """Rows of a tile for this many row-expert pairs over all experts, here or elsewhere.

    An expert's last tile is half empty on average, so a tile is half an expert's fair share.
    """
    half = assignments // (2 * num_experts)
    return min(512, max(8, -(-half // 8) * 8))


def training_tile_rows(assignments: int, num_experts: int) -> tuple[int, ...]:
    """Rows of tiles where gradients are wanted: an expert's fair share, since many small products
    take longer than a large one, and an eighth of it for what is left."""
    share = -(-assignments // num_experts)
    if share < 64:
        return (-(-share // 8) * 8,)
    whole = min(512, share // 64 * 64)
    return whole, whole // 8


def few_tile_rows(rows: int, chosen: int, num_experts: int) -> int:
    """Rows of a tile for a step of this many rows: where they are few, twice an expert's fair
    share, so that nearly always one tile holds them all and little of it is empty."""
    usual, share = tile_rows(rows * chosen, num_experts), -(-rows * chosen // num_experts)
    return usual if usual > FEW else min(rows, 2 * share, FEW)


def _sorted_assignments(chosen_RC, num_experts, tile):
    """Row-expert pairs in order of expert, as indices into the flat (R*C), one tile of padding.

    Returns order_P (P = R*C + M; padding holds R*C, past the end), start_E and count_E.
    """
    flat = chosen_RC.reshape(-1)
    here = (flat >= 0) & (flat < num_experts)
    flat = jnp.where(here, flat, num_experts)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    order = jnp.concatenate([order, jnp.full((tile,), flat.size, jnp.int32)])
    count_E = jnp.sum(flat[:, None] == jnp.arange(num_experts)[None, :], axis=0, dtype=jnp.int32)
    return order, jnp.cumsum(count_E) - count_E, count_E


def _for_each_expert(body, carry, count_E):
    """Runs body(carry, e) for each expert that has rows."""

    def one(e, carry):
        return jax.lax.cond(count_E[e] > 0, lambda c: body(c, e), lambda c: c, carry)

    return jax.lax.fori_loop(0, count_E.shape[0], one, carry)


def for_each_tile(body, carry, order, start, count, tiles):
    """Runs body(place, pairs_M, carry) on the `count` pairs that are in `order` from `start` on, a
    tile of them at a time, and returns the last carry.

    The first of a tile is at `place` of the order, of which the end is padded by a large tile;
    places past the last pair hold the number of all. `tiles` are numbers of rows, large ones first.
    Half of a large tile's rows take as long in small ones: so many at most are left to these.
    """
    past = order.shape[0] - tiles[0]
    for tile in tiles:
        spare = tile - 1 if tile == tiles[-1] else tile // 2 - 1
        number = jnp.maximum(count + spare, 0) // tile

        def step(i, carry, tile=tile, start=start, count=count):
            place = start + i * tile
            pairs = jax.lax.dynamic_slice(order, (place,), (tile,))
            pairs = jnp.where(jnp.arange(tile) < count - i * tile, pairs, past)
            return body(place, pairs, carry)

        carry = jax.lax.fori_loop(0, number, step, carry)
        start, count = start + number * tile, count - number * tile
    return carry


def _take(x, indices):
    """Rows of `x`; zeros for indices past the end."""
    return x.at[indices].get(mode="fill", fill_value=0)


def _expert(w, e, dtype, tile: int) -> Weight | InPlace:
    """One expert's matrix as floats, or where it lies if the tile has few rows."""
    stacked = isinstance(w, StackedArray) or (isinstance(w, QuantizedArray) and w.layer is not None)
    if stacked and tile <= FEW and hardware.platform() == "cpu":
        return InPlace(w, e)
    if isinstance(w, QuantizedArray):
        return w[e].dequantize(dtype)
    return w[e].astype(dtype) if isinstance(w, StackedArray) else w[e]


def _forward(x_RD, gate_RC, chosen_RC, w_gate_EDF, w_up_EDF, w_down_EFD, tile, tiles):
    """y_RD, and what backward needs: also the products of all pairs in order of their expert,
    which cost less to keep than to compute again."""
    E, C = w_gate_EDF.shape[0], chosen_RC.shape[1]
    tiles = tiles or (tile,)
    order, start_E, count_E = _sorted_assignments(chosen_RC, E, tiles[0])
    gate = gate_RC.reshape(-1)

    def expert(carry, e):
        gate_DF, up_DF, down_FD = w_gate_EDF[e], w_up_EDF[e], w_down_EFD[e]

        def one_tile(place, pairs, carry):
            y_RD, *kept = carry
            x_MD = _take(x_RD, pairs // C)
            products = product(x_MD, gate_DF), product(x_MD, up_DF)
            # Rows past an expert's end are the next one's, who writes them after it.
            kept = [
                jax.lax.dynamic_update_slice(all_PF, some_MF.astype(x_RD.dtype), (place, 0))
                for all_PF, some_MF in zip(kept, products, strict=True)
            ]
            y_MD = product(join(*products).astype(x_RD.dtype), down_FD)
            y_MD *= _take(gate, pairs)[:, None]
            return y_RD.at[pairs // C].add(y_MD, mode="drop"), *kept

        return for_each_tile(one_tile, carry, order, start_E[e], count_E[e], tiles)

    shape = len(order), w_gate_EDF.shape[2]
    kept = [_zeros(shape, x_RD.dtype) for _ in range(2)]
    y_RD, *kept = _for_each_expert(expert, (_zeros(x_RD.shape), *kept), count_E)
    return y_RD, (x_RD, gate_RC, chosen_RC, kept, w_gate_EDF, w_up_EDF, w_down_EFD)


def _zeros(shape, dtype=jnp.float32):
    """Zeros to add to; typed, like what is added, as different on every device."""
    return sharding.pvary(jnp.zeros(shape, dtype))


def _backward(tile, tiles, saved, dy_RD):
    x_RD, gate_RC, chosen_RC, kept, *weights = saved
    E, (R, C) = weights[0].shape[0], chosen_RC.shape
    tiles = tiles or (tile,)
    order, start_E, count_E = _sorted_assignments(chosen_RC, E, tiles[0])
    gate = gate_RC.reshape(-1)

    def expert(carry, e):
        local = [w[e] for w in weights]

        def one_tile(place, pairs, carry):
            dx_RD, dgate, dlocal = carry
            rows = pairs // C
            products = (jax.lax.dynamic_slice_in_dim(all_PF, place, len(rows)) for all_PF in kept)
            dx_MD, dgate_M, dw = expert_mlp_gradients(
                _take(x_RD, rows), _take(gate, pairs), _take(dy_RD, rows), *products, *local
            )
            return (
                dx_RD.at[rows].add(dx_MD, mode="drop"),
                dgate.at[pairs].add(dgate_M, mode="drop"),
                jax.tree.map(jnp.add, dlocal, dw),
            )

        trained = tuple(map(trained_part, local))
        carry = (*carry, jax.tree.map(lambda w: _zeros(w.shape), trained))
        dx_RD, dgate, dlocal = for_each_tile(one_tile, carry, order, start_E[e], count_E[e], tiles)
        return (dx_RD, dgate), jax.tree.map(lambda d, w: d.astype(w.dtype), dlocal, trained)

    carry = (_zeros(x_RD.shape), _zeros((R * C,)))
    (dx_RD, dgate), dweights = jax.lax.scan(expert, carry, jnp.arange(E))
    return dx_RD.astype(x_RD.dtype), dgate.reshape(R, C), None, *dweights


# Under remat the first pass is the function itself, and nothing is written for a backward pass.
experts_tiled.defvjp(_forward, _backward, optimize_remat=True)
