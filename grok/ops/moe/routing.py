"""Rows grouped by expert, in tiles that belong to one expert each.

An expert's last tile is padded, so that no tile needs a mask; the routing changes no shape, only
how many of the tiles are used.

Letters: R rows (tokens), C chosen experts of a row, J = R*C assignments (of a row to one of its
experts), E experts, I tiles, M rows of a tile, P = I*M slots.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from grok.ops.moe.tiling import kernel_tile_rows


class GroupedLayout(NamedTuple):
    """The slots of the assignments, int32."""

    assignment_P: jax.Array  # the assignment in each slot; R*C in an empty one
    slot_RC: jax.Array  # the slot of each assignment
    tiles_E: jax.Array  # number of tiles of each expert


class TileSchedule(NamedTuple):
    """The steps over tiles that a kernel makes, int32."""

    expert_I: jax.Array
    tile_I: jax.Array
    has_rows_I: jax.Array  # 0 where the expert has none
    num_steps: jax.Array  # (1,)


@jax.named_scope("group_by_expert")
def group_by_expert(expert_ids_RC: jax.Array, E: int) -> GroupedLayout:
    """Slots of all assignments, for expert ids in [0, E), those of a row all different.

    There are at most R*C/M tiles and one more for each expert; where M >= R, one for each.
    """
    R, C = expert_ids_RC.shape
    J, M = R * C, kernel_tile_rows(R, C, E)
    max_tiles = min(J // M + E, E * -(-R // M))
    expert_J = expert_ids_RC.reshape(-1)
    # One key of expert and index: a sort of keys alone compiles and runs faster.
    sorted_J = jax.lax.sort(expert_J * J + jnp.arange(J, dtype=jnp.int32), is_stable=False) % J
    is_EJ = (expert_J[None, :] == jnp.arange(E)[:, None]).astype(jnp.int32)
    up_to_EJ = jnp.cumsum(is_EJ, axis=1)
    count_E = up_to_EJ[:, -1]
    tiles_E = -(-count_E // M)
    first_tile_E = jnp.cumsum(tiles_E) - tiles_E
    slot_J = jnp.sum(is_EJ * (up_to_EJ - 1 + M * first_tile_E[:, None]), axis=0)

    expert_I, tile_I, _, num_steps = tile_schedule(tiles_E, max_tiles)
    before_I = (tile_I - first_tile_E[expert_I]) * M  # the expert's assignments in earlier tiles
    start_I = (jnp.cumsum(count_E) - count_E)[expert_I] + before_I
    left_I = jnp.where(jnp.arange(max_tiles) < num_steps, count_E[expert_I] - before_I, 0)
    padded = jnp.concatenate([sorted_J, jnp.zeros(M, jnp.int32)])
    assignment_IM = jax.vmap(lambda start: jax.lax.dynamic_slice(padded, (start,), (M,)))(start_I)
    assignment_IM = jnp.where(jnp.arange(M)[None, :] < left_I[:, None], assignment_IM, J)
    return GroupedLayout(assignment_IM.reshape(-1), slot_J.reshape(R, C), tiles_E)


def tile_schedule(tiles_E: jax.Array, max_steps: int, empty: int = 0) -> TileSchedule:
    """Each tile once, in order of expert, and `empty` steps for an expert that has none; of the
    `max_steps` steps only the first `num_steps` are made."""
    steps_E = jnp.where(tiles_E == 0, empty, tiles_E)
    end_E = jnp.cumsum(steps_E)
    step_I = jnp.arange(max_steps, dtype=jnp.int32)
    expert_I = jnp.sum(step_I[:, None] >= end_E[None, :], axis=1, dtype=jnp.int32)
    expert_I = jnp.minimum(expert_I, tiles_E.size - 1)
    shift_E = (jnp.cumsum(tiles_E) - tiles_E) - (end_E - steps_E)
    has_rows_I = (tiles_E[expert_I] > 0) & (step_I < end_E[-1])
    tile_I = jnp.where(has_rows_I, step_I + shift_E[expert_I], 0)
    return TileSchedule(expert_I, tile_I, has_rows_I.astype(jnp.int32), end_E[-1:])
