"""Fast forms of the experts on CPU: a matrix that is read in place, tiles of two sizes.

A program that takes one matrix out of many copies it first, since a product wants an array of its
own: for a row or two that is most of the time. Read a few of its rows at a time, in one loop with
the multiplication, the matrix is read from memory once and written nowhere.

Letters: M rows, D contracted, F columns.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from grok import hardware
from grok.ops.moe.tiling import MAX_MATVEC_ROWS
from grok.ops.weights.layer_slice import LayerSlice
from grok.ops.weights.quantized import QuantizedArray
from grok.ops.weights.weight import is_stacked, matmul

# Rows of the matrix that one iteration adds: more would leave the nearest cache.
ROWS_PER_ITER = 8


@dataclasses.dataclass(frozen=True)
class ExpertSlice:
    """One expert's matrix of a layer, to be read in place."""

    stack: LayerSlice | QuantizedArray
    expert: Any


def reads_in_place(w: Any, tile: int) -> bool:
    """True if a product of `tile` rows with an expert of `w` is faster in place, on CPU."""
    return is_stacked(w) and tile <= MAX_MATVEC_ROWS and hardware.platform() == "cpu"


@matmul.register
def matvec_in_place(w_DF: ExpertSlice, x_MD: jax.Array) -> jax.Array:
    """x w, the weights rounded to the type of x, summed in float32 in order of D, y_MF float32.

    It runs at memory speed for a few rows; past MAX_MATVEC_ROWS, a copy and a plain product cost
    less. A row's bits do not depend on the other rows.
    """
    stack = w_DF.stack
    D, F = stack.shape[-2:]
    rows_per_iter = math.gcd(D, ROWS_PER_ITER)

    def weights(d):
        return stack.read_row(w_DF.expert, d).astype(x_MD.dtype).astype(jnp.float32)

    def add_rows(i, y_MF):
        for offset in range(rows_per_iter):
            d = i * rows_per_iter + offset
            x_M1 = jax.lax.dynamic_slice_in_dim(x_MD, d, 1, axis=1).astype(jnp.float32)
            y_MF += x_M1 * weights(d)
        return y_MF

    # From x, so that it is typed as varying over devices, as the sum is.
    zeros_MF = jnp.zeros((len(x_MD), F), jnp.float32) + 0 * x_MD[:, :1].astype(jnp.float32)
    return jax.lax.fori_loop(0, D // rows_per_iter, add_rows, zeros_MF)


def for_each_tile(body: Callable, carry, order_P, start, count, tiles: tuple[int, ...]):
    """Runs body(slot, assignments_M, carry) on the `count` assignments in `order_P` from `start`
    on, a tile at a time, and returns the last carry.

    `slot` is the tile's first in the order, whose end is padded by a large tile; slots after the
    last assignment hold the number of all. `tiles` are numbers of rows, large ones first: half of a
    large tile's rows take as long in small ones, so at most so many are left to these.
    """
    past_end = order_P.shape[0] - tiles[0]
    for tile in tiles:
        spare = tile - 1 if tile == tiles[-1] else tile // 2 - 1
        num_tiles = jnp.maximum(count + spare, 0) // tile

        def step(i, carry, tile=tile, start=start, count=count):
            slot = start + i * tile
            assignments = jax.lax.dynamic_slice(order_P, (slot,), (tile,))
            assignments = jnp.where(jnp.arange(tile) < count - i * tile, assignments, past_end)
            return body(slot, assignments, carry)

        carry = jax.lax.fori_loop(0, num_tiles, step, carry)
        start, count = start + num_tiles * tile, count - num_tiles * tile
    return carry
