"""The routed experts: y_r = sum over a row's chosen experts of gate * down(gelu(gate_up) * up).

Two forms of the same mathematics. `experts_reference` runs every expert on every row.
`experts_tiled` runs each expert on its own rows only, a tile at a time: exact at any imbalance,
nothing dropped, its cost that of the chosen experts, and no buffer grows with the imbalance.

Letters: R rows (tokens), C chosen experts of a row, D embed, F mlp, E experts, M rows of a tile.
"""

import jax
import jax.numpy as jnp

from grok import sharding


def gelu(x: jax.Array) -> jax.Array:
    """GELU in its tanh approximation (Hendrycks & Gimpel 2016, section 2), as the release's."""
    return jax.nn.gelu(x, approximate=True)


def expert_mlp(
    x_RD: jax.Array, w_gate_DF: jax.Array, w_up_DF: jax.Array, w_down_FD: jax.Array
) -> jax.Array:
    """One expert on rows: (gelu(x w_gate) * (x w_up)) w_down, summed in float32, y_RD float32."""
    gate_RF = jnp.dot(x_RD, w_gate_DF, preferred_element_type=jnp.float32)
    up_RF = jnp.dot(x_RD, w_up_DF, preferred_element_type=jnp.float32)
    hidden_RF = (gelu(gate_RF) * up_RF).astype(x_RD.dtype)
    return jnp.dot(hidden_RF, w_down_FD, preferred_element_type=jnp.float32)


def experts_reference(x_RD, gate_RC, chosen_RC, w_gate_EDF, w_up_EDF, w_down_EFD):
    """Every expert on every row; arguments and result as of `experts_tiled`."""
    mlp = jax.vmap(expert_mlp, in_axes=(None, 0, 0, 0))
    every_ERD = mlp(x_RD, w_gate_EDF, w_up_EDF, w_down_EFD)
    experts_E = jnp.arange(w_gate_EDF.shape[0])
    share_RCE = (chosen_RC[:, :, None] == experts_E[None, None, :]) * gate_RC[:, :, None]
    return jnp.einsum("rce,erd->rd", share_RCE, every_ERD)


@jax.custom_vjp
def experts_tiled(
    x_RD: jax.Array,
    gate_RC: jax.Array,
    chosen_RC: jax.Array,
    w_gate_EDF: jax.Array,
    w_up_EDF: jax.Array,
    w_down_EFD: jax.Array,
) -> jax.Array:
    """Sum over each row's chosen experts of gate * expert(row), y_RD in float32.

    `chosen_RC` int32 holds experts in [0, E); a value outside is an expert that is not here and
    adds nothing. `gate_RC` is float32. Gradients flow to the rows, the gates and the weights.
    """
    return _forward(x_RD, gate_RC, chosen_RC, w_gate_EDF, w_up_EDF, w_down_EFD)[0]


def _tile_rows(assignments: int, experts: int) -> int:
    """Rows of a tile: about one expert's fair share, within what fills a core and wastes little."""
    fair = -(-assignments // experts)
    return min(512, max(8, -(-fair // 8) * 8))


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


def _for_each_tile(body, carry, order, start, count, tile):
    """Runs body(pairs_M, carry) on one expert's pairs; places past its end hold R*C."""
    past = order.shape[0] - tile

    def step(i, carry):
        pairs = jax.lax.dynamic_slice(order, (start + i * tile,), (tile,))
        pairs = jnp.where(jnp.arange(tile) < count - i * tile, pairs, past)
        return body(pairs, carry)

    return jax.lax.fori_loop(0, (count + tile - 1) // tile, step, carry)


def _take(x, indices):
    """Rows of `x`; zeros for indices past the end."""
    return x.at[indices].get(mode="fill", fill_value=0)


def _forward(x_RD, gate_RC, chosen_RC, w_gate_EDF, w_up_EDF, w_down_EFD):
    E, (R, C) = w_gate_EDF.shape[0], chosen_RC.shape
    tile = _tile_rows(R * C, E)
    order, start_E, count_E = _sorted_assignments(chosen_RC, E, tile)
    gate = gate_RC.reshape(-1)

    def expert(y_RD, e):
        weights = [w[e] for w in (w_gate_EDF, w_up_EDF, w_down_EFD)]

        def one_tile(pairs, y_RD):
            y_MD = expert_mlp(_take(x_RD, pairs // C), *weights)
            return y_RD.at[pairs // C].add(y_MD * _take(gate, pairs)[:, None], mode="drop")

        return _for_each_tile(one_tile, y_RD, order, start_E[e], count_E[e], tile)

    def one_expert(e, y_RD):
        return jax.lax.cond(count_E[e] > 0, lambda y: expert(y, e), lambda y: y, y_RD)

    y_RD = jax.lax.fori_loop(0, E, one_expert, _zeros(x_RD.shape))
    return y_RD, (x_RD, gate_RC, chosen_RC, w_gate_EDF, w_up_EDF, w_down_EFD)


def _zeros(shape):
    """Float32 zeros to add to; typed, like what is added, as different on every device."""
    return sharding.vary(jnp.zeros(shape, jnp.float32))


def _backward(saved, dy_RD):
    x_RD, gate_RC, chosen_RC, *weights = saved
    E, (R, C) = weights[0].shape[0], chosen_RC.shape
    tile = _tile_rows(R * C, E)
    order, start_E, count_E = _sorted_assignments(chosen_RC, E, tile)
    gate = gate_RC.reshape(-1)

    def expert(carry, e):
        local = [w[e] for w in weights]

        def one_tile(pairs, carry):
            dx_RD, dgate, dlocal = carry
            rows = pairs // C
            dy_MD, gate_M = _take(dy_RD, rows), _take(gate, pairs)
            y_MD, pull = jax.vjp(expert_mlp, _take(x_RD, rows), *local)
            dx_MD, *dw = pull(dy_MD * gate_M[:, None])
            return (
                dx_RD.at[rows].add(dx_MD.astype(jnp.float32), mode="drop"),
                dgate.at[pairs].add(jnp.sum(dy_MD * y_MD, axis=-1), mode="drop"),
                [total + part.astype(jnp.float32) for total, part in zip(dlocal, dw, strict=True)],
            )

        carry = (*carry, [_zeros(w.shape) for w in local])
        dx_RD, dgate, dlocal = _for_each_tile(one_tile, carry, order, start_E[e], count_E[e], tile)
        return (dx_RD, dgate), [d.astype(w.dtype) for d, w in zip(dlocal, local, strict=True)]

    carry = (_zeros(x_RD.shape), _zeros((R * C,)))
    (dx_RD, dgate), dweights = jax.lax.scan(expert, carry, jnp.arange(E))
    return dx_RD.astype(x_RD.dtype), dgate.reshape(R, C), None, *dweights


experts_tiled.defvjp(_forward, _backward)
