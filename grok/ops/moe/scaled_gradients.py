"""The backward pass of the hidden layer in 8 bits: TPU kernels, and the same in plain XLA.

From the products of the hidden layer come the operands of five products: gradients scaled by row,
for those of the rows, and three arrays scaled by column within a tile, for those of the matrices.
Letters as in `grok.ops.moe.grouped_blocks`, and I tiles, G groups of columns.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grok.hardware import LANES
from grok.ops.moe.grouped_blocks import compiler_params, weight_gradient
from grok.ops.moe.routing import tile_schedule
from grok.ops.moe.scaled_hidden import ROWS_PER_STORE
from grok.ops.moe.scaled_matmul import map_tiles
from grok.ops.pallas import pl, pltpu
from grok.ops.scaled import (
    MatmulFormat,
    Scaled,
    group_columns,
    max_value,
    quantize,
    quantize_by,
    quantize_groups,
    scaled_dot,
)
from grok.ops.varying import shape_like


class RowFactors(NamedTuple):
    """Numbers of the slots, (P, 1) float32."""

    weights: jax.Array  # of the assignments; 0 in empty slots
    x_scales: jax.Array  # of the rows that the gate and up matrices multiply
    dy_scales: jax.Array  # of the gradients of the experts' outputs


class HiddenGradients(NamedTuple):
    """Operands in 8 bits. By rows, scales are (P, G), and gradients have those of the matrices'
    columns folded in; by columns, scales are (I, 1, N), and arrays have those of the rows that they
    are multiplied by folded in."""

    by_rows: tuple[Scaled, ...]  # of the products gate and up
    by_columns: tuple[Scaled, ...]  # of these, and the hidden layer times the weights
    weights_P1: jax.Array  # gradients of the weights, float32


def hidden_gradients_xla(
    products, dhidden_PN, factors: RowFactors, scales_EN, tiles_E, tile, *, formats, activation
) -> HiddenGradients:
    """As `hidden_gradients`; slots after the last tile may hold anything."""
    N = dhidden_PN.shape[1]

    def one_tile(expert, *arrays):
        columns = [scale_EN[expert][None, :] for scale_EN in scales_EN]
        rows, by_columns, dweight_M1 = _gradients(activation, *arrays, *columns)
        return (
            [quantize_groups(a, group_columns(N), formats.gradients) for a in rows],
            [a[None] for a in by_columns],
            dweight_M1,
        )

    rows, by_columns, dweights = map_tiles(one_tile, tiles_E, tile, *products, dhidden_PN, *factors)
    types = formats.gradients, formats.gradients, formats.values
    scaled = [
        quantize(a.reshape(-1, tile, N), 1, dtype)
        for a, dtype in zip(by_columns, types, strict=True)
    ]
    columns = [Scaled(s.values.reshape(-1, N), s.scales) for s in scaled]
    return HiddenGradients(tuple(rows), tuple(columns), dweights)


def _gradients(activation, gate, up, dhidden, weight_M1, x_scale_M1, dy_scale_M1, gate_1N, up_1N):
    """Of a block of rows, in float32: gradients of both products times the columns' scales; these
    and the hidden layer times the rows' factors; gradients of the weights."""
    dhidden = dhidden.astype(jnp.float32)
    hidden, pull = jax.vjp(activation, gate.astype(jnp.float32), up.astype(jnp.float32))
    dgate, dup = pull(dhidden * weight_M1)
    rows = dgate * gate_1N, dup * up_1N
    columns = dgate * x_scale_M1, dup * x_scale_M1, hidden * (weight_M1 * dy_scale_M1)
    return rows, columns, jnp.sum(dhidden * hidden, axis=1, keepdims=True)


def hidden_gradients(
    products: tuple[jax.Array, jax.Array],
    dhidden_PN,
    factors: RowFactors,
    scales_EN: tuple[jax.Array, jax.Array],
    tiles_E,
    tile: int,
    *,
    formats: MatmulFormat,
    activation: Callable,
    max_tiles: int,
    interpret: Any = False,
) -> HiddenGradients:
    """Operands of the products of the backward pass, from gate_PN and up_PN, the gradient
    dhidden_PN of `activation(gate, up)` before the weights, and the scales of the columns of both
    matrices. Slots after the last tile are not written."""
    P, N = dhidden_PN.shape
    group = group_columns(N)
    schedule = tile_schedule(tiles_E, P // tile)
    block = pl.BlockSpec((tile, group), lambda n, i, expert, tile: (tile[i], n))
    row = pl.BlockSpec((tile, 1), lambda n, i, expert, tile: (tile[i], 0))
    column = pl.BlockSpec((None, 1, group), lambda n, i, expert, tile: (tile[i], 0, n))
    scale = pl.BlockSpec((None, 1, group), lambda n, i, expert, tile: (expert[i], 0, n))
    sums = pl.BlockSpec((None, tile, 3), lambda n, i, expert, tile: (n, tile[i], 0))
    shape = functools.partial(shape_like, dhidden_PN)
    by_columns, hidden = (
        (shape((P, N), dtype), shape((P // tile, 1, N), jnp.float32)) for dtype in formats[::-1]
    )
    block_bytes = tile * group * (2 * 3 * dhidden_PN.itemsize + 2 * 5 + 3 * 4 + 4 * 4)
    args = tuple(scale_EN[:, None, :] for scale_EN in scales_EN)
    *results, sums_nP3 = pl.pallas_call(
        functools.partial(_gradients_kernel, activation),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(N // group, schedule.num_steps[0]),
            in_specs=[*[block] * 3, *[row] * 3, scale, scale],
            out_specs=[block, block, *[block, column] * 3, sums],
            scratch_shapes=[pltpu.VMEM((tile, group), jnp.float32)] * 3,
        ),
        out_shape=[
            *[shape((P, N), formats.gradients)] * 2,
            *by_columns * 2,
            *hidden,
            shape((N // group, P, 3), jnp.float32),
        ],
        compiler_params=compiler_params(1, block_bytes + 8 * tile * LANES * 4, dims=2),
        cost_estimate=_cost(tile * min(max_tiles, P // tile), N, dhidden_PN.itemsize),
        interpret=interpret,
        name="hidden_gradients",
    )(schedule.expert_I, schedule.tile_I, *products, dhidden_PN, *factors, *args)
    rows = [Scaled(results[i], sums_nP3[:, :, i].T) for i in range(2)]
    columns = [Scaled(*results[i : i + 2]) for i in range(2, 8, 2)]
    dweights_P1 = jnp.sum(sums_nP3[:, :, 2], axis=0)[:, None]
    return HiddenGradients(tuple(rows), tuple(columns), dweights_P1)


def _cost(P: int, N: int, itemsize: int) -> "pl.CostEstimate":
    """Cost without products: three arrays read, five written in 8 bits, and numbers of rows."""
    size = P * N * (3 * itemsize + 5) + 4 * P * LANES * 4 * (N // group_columns(N))
    return pl.CostEstimate(flops=0, bytes_accessed=size, transcendentals=P * N)


def _gradients_kernel(activation, expert, tile, *refs):
    """One group of columns of a tile; `refs` are those of the operands, of two results by rows and
    three by columns, and of numbers of the rows: two scales, and the gradient of the weight."""
    inputs, row_refs, column_refs, sums_ref = refs[:8], refs[8:10], refs[10:16], refs[16]
    scratch = refs[17:]
    M, N = scratch[0].shape
    step = math.gcd(M, ROWS_PER_STORE)

    def rows_of(i):
        return pl.ds(pl.multiple_of(i * step, step), step)

    def first(i, magnitudes):
        rows = rows_of(i)
        blocks = [ref[rows, :] for ref in inputs[:6]]
        columns = [ref[...] for ref in inputs[6:]]
        by_rows, by_columns, dweight_M1 = _gradients(activation, *blocks, *columns)
        for number, (a, values_ref) in enumerate(zip(by_rows, row_refs, strict=True)):
            scaled = quantize(a, 1, values_ref.dtype)
            values_ref[rows, :] = scaled.values
            sums_ref[rows, number : number + 1] = scaled.scales
        sums_ref[rows, 2:3] = dweight_M1
        for a, ref in zip(by_columns, scratch, strict=True):
            ref[rows, :] = a
        tops = (jnp.max(jnp.abs(a), axis=0, keepdims=True) for a in by_columns)
        return tuple(map(jnp.maximum, magnitudes, tops))

    zeros = (jnp.zeros((1, N), jnp.float32),) * 3
    magnitudes = jax.lax.fori_loop(0, M // step, first, zeros)
    pairs = zip(column_refs[::2], column_refs[1::2], strict=True)
    for magnitude, (values_ref, scales_ref) in zip(magnitudes, pairs, strict=True):
        scales_ref[...] = magnitude * (1 / max_value(values_ref.dtype))

    def second(i, _):
        rows = rows_of(i)
        for a_ref, magnitude, ref in zip(scratch, magnitudes, column_refs[::2], strict=True):
            ref[rows, :] = quantize_by(a_ref[rows, :], magnitude, ref.dtype).values

    jax.lax.fori_loop(0, M // step, second, None)


def scaled_weight_gradient_xla(x_PK, dy: Scaled, tiles_E, tile: int, *, dtype) -> jax.Array:
    """As `scaled_weight_gradient`."""
    E, steps = tiles_E.size, len(x_PK) // tile
    schedule = tile_schedule(tiles_E, steps)

    def add(dw_EKN, i):
        x_MK, dy_MN = (jax.lax.dynamic_slice_in_dim(a, i * tile, tile) for a in (x_PK, dy.values))
        product = scaled_dot(x_MK, dy_MN, 0, 0) * dy.scales[i]
        product = jnp.where(i < schedule.num_steps[0], product, 0)
        return dw_EKN.at[schedule.expert_I[i]].add(product), None

    shape = shape_like(x_PK, (E, x_PK.shape[1], dy.values.shape[1]), jnp.float32)
    zeros = jnp.zeros(shape.shape, shape.dtype) + 0 * dy.scales[0, 0, 0]  # typed as what is added
    return jax.lax.scan(add, zeros, jnp.arange(steps))[0].astype(dtype)


def scaled_weight_gradient(
    x_PK, dy: Scaled, tiles_E, tile: int, *, dtype, max_tiles: int, interpret: Any = False
) -> jax.Array:
    """Sum over each expert's rows of x^T dy, (E, K, N), in float32 and then `dtype`, of 8-bit
    values: x has its scales folded into dy, whose own are (I, 1, N)."""

    def product(x_MK, dy_MN, scale_1N):
        return scaled_dot(x_MK, dy_MN, 0, 0) * scale_1N

    return weight_gradient(
        product,
        x_PK,
        dy.values,
        (dy.scales,),
        tiles_E,
        tile,
        dtype=dtype,
        row_itemsize=4,  # a product beside the sum
        max_tiles=max_tiles,
        interpret=interpret,
        name="scaled_weight_gradient",
    )
