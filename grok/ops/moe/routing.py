"""Rows sorted by expert, in tiles that belong to one expert each.

An expert's last tile is filled up, so that no tile needs a mask; how rows are routed changes no
shape, only how many of the tiles there are.

Letters: R rows (tokens), C chosen experts of a row, E experts, I tiles, M rows of a tile,
P = I*M places, J = R*C pairs of a row and its expert.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from grok.hardware import has_large_vmem
from grok.ops.moe.tiling import LANES


class Places(NamedTuple):
    """Where the pairs lie, int32."""

    pair_P: jax.Array  # which pair is at a place; R*C where there is none
    place_RC: jax.Array  # where each pair is
    tiles_E: jax.Array  # tiles of each expert


class Visits(NamedTuple):
    """The steps over tiles that a kernel makes, int32."""

    expert_I: jax.Array
    tile_I: jax.Array
    live_I: jax.Array  # 0 where the expert has no rows
    steps: jax.Array  # how many there are, (1,)


def tile_rows(rows: int, chosen: int, experts: int) -> int:
    """Rows of a tile: an eighth of an expert's fair share, but between 128, below which a matrix
    unit gains nothing, and 512, or 256 where weights take most of a core's memory; and no more than
    there are rows."""
    share = rows * chosen // (8 * experts) // LANES * LANES
    most = (2 if has_large_vmem() else 4) * LANES
    return min(max(share, LANES), most, -(-rows // 16) * 16)


def place(chosen_RC: jax.Array, experts: int) -> Places:
    """Places of all pairs, for `chosen_RC` in [0, experts), those of a row all different.

    There are at most R*C/M tiles and one more for each expert; where M >= R, one for each.
    """
    R, C = chosen_RC.shape
    J, M = R * C, tile_rows(R, C, experts)
    most = min(J // M + experts, experts * -(-R // M))
    flat_J = chosen_RC.reshape(-1)
    # One key for expert and number: a sort of keys alone compiles and runs faster.
    sorted_J = jax.lax.sort(flat_J * J + jnp.arange(J, dtype=jnp.int32), is_stable=False) % J
    is_EJ = (flat_J[None, :] == jnp.arange(experts)[:, None]).astype(jnp.int32)
    up_to_EJ = jnp.cumsum(is_EJ, axis=1)
    count_E = up_to_EJ[:, -1]
    tiles_E = -(-count_E // M)
    first_E = jnp.cumsum(tiles_E) - tiles_E
    place_J = jnp.sum(is_EJ * (up_to_EJ - 1 + M * first_E[:, None]), axis=0)

    expert_I, tile_I, _, count = visits(tiles_E, most)
    before_I = (tile_I - first_E[expert_I]) * M  # pairs of the expert in its tiles before
    start_I = (jnp.cumsum(count_E) - count_E)[expert_I] + before_I
    rest_I = jnp.where(jnp.arange(most) < count, count_E[expert_I] - before_I, 0)
    padded = jnp.concatenate([sorted_J, jnp.zeros(M, jnp.int32)])
    pair_IM = jax.vmap(lambda start: jax.lax.dynamic_slice(padded, (start,), (M,)))(start_I)
    pair_IM = jnp.where(jnp.arange(M)[None, :] < rest_I[:, None], pair_IM, J)
    return Places(pair_IM.reshape(-1), place_J.reshape(R, C), tiles_E)


def visits(tiles_E: jax.Array, most: int, empty: int = 0) -> Visits:
    """Each tile once, in order of expert, and `empty` steps for an expert that has none; `most`
    steps in all, of which those from the count on are not made."""
    steps_E = jnp.where(tiles_E == 0, empty, tiles_E)
    last_E = jnp.cumsum(steps_E)
    step_I = jnp.arange(most, dtype=jnp.int32)
    expert_I = jnp.sum(step_I[:, None] >= last_E[None, :], axis=1, dtype=jnp.int32)
    expert_I = jnp.minimum(expert_I, tiles_E.size - 1)
    moved_E = (jnp.cumsum(tiles_E) - tiles_E) - (last_E - steps_E)
    live_I = (tiles_E[expert_I] > 0) & (step_I < last_E[-1])
    tile_I = jnp.where(live_I, step_I + moved_E[expert_I], 0)
    return Visits(expert_I, tile_I, live_I.astype(jnp.int32), last_E[-1:])
