"""Products of tiles of rows with the matrix of each tile's expert: TPU kernels.

Weights are stationary: a block of an expert's matrix is read once for all its tiles, and as int8 or
int4 where it is that. Letters as in `grok.ops.moe.grouped_blocks`, and G groups of scales, L
layers.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from grok.hardware import has_small_vmem
from grok.ops.moe.grouped_blocks import Blocks, dot, make_blocks, weight_gradient
from grok.ops.moe.routing import tile_schedule
from grok.ops.moe.tiling import KernelBytes
from grok.ops.varying import shape_like
from grok.ops.weights.weight import kernel_operands, take_expert


def grouped_matmul_reference(x_PK, w_EKN, tiles_E, tile: int) -> jax.Array:
    """Each tile times its expert's matrix, y_PN in float32; zeros after the last tile."""
    x_IMK = x_PK.reshape(-1, tile, x_PK.shape[1])
    w_EKN = jnp.stack([take_expert(w_EKN, e, x_PK.dtype) for e in range(tiles_E.size)])
    y_IEMN = jnp.einsum("imk,ekn->iemn", x_IMK, w_EKN, preferred_element_type=jnp.float32)
    return jnp.einsum("ie,iemn->imn", _experts_of_tiles(tiles_E, len(x_IMK)), y_IEMN).reshape(
        len(x_PK), -1
    )


def weight_gradient_reference(x_PK, dy_PN, tiles_E, tile: int) -> jax.Array:
    """Sum over each expert's rows of x^T dy, (E, K, N) in float32."""
    x_IMK, dy_IMN = (a.astype(jnp.float32).reshape(-1, tile, a.shape[1]) for a in (x_PK, dy_PN))
    dw_IKN = jnp.einsum("imk,imn->ikn", x_IMK, dy_IMN)
    return jnp.einsum("ie,ikn->ekn", _experts_of_tiles(tiles_E, len(x_IMK)), dw_IKN)


def _experts_of_tiles(tiles_E, max_tiles: int) -> jax.Array:
    """1 where a tile is an expert's."""
    schedule = tile_schedule(tiles_E, max_tiles)
    is_used_I = jnp.arange(max_tiles) < schedule.num_steps
    is_IE = schedule.expert_I[:, None] == jnp.arange(tiles_E.size)[None, :]
    return (is_IE & is_used_I[:, None]).astype(jnp.float32)


def grouped_matmul(
    xs: tuple[jax.Array, ...],
    ws: tuple[Any, ...],
    tiles_E,
    tile: int,
    *,
    dtype,
    transposed: bool = False,
    max_tiles: int | None = None,
    start: jax.Array | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Sum over pairs of x_PK and w_EKN of each tile times its expert's matrix, y_PN in `dtype`.

    `ws` are arrays, of shape (E, N, K) when `transposed`, or one QuantizedArray. Products are
    summed in float32, from `start` on if given, an array like y_PN that y_PN overwrites. Slots
    after the last tile are not written. `max_tiles` bounds the tiles with rows, for the cost
    estimate.
    """
    layer, _, w_scales = kernel_operands(ws[0])
    values = [kernel_operands(w)[1] for w in ws]
    scales = [] if w_scales is None else [w_scales]
    P, N = len(xs[0]), values[0].shape[2 if transposed else 3]
    starts = [] if start is None else [start]
    results = (1 + len(starts)) * jnp.dtype(dtype).itemsize  # written, and read as the start
    size = _kernel_bytes(xs, values, scales, results)
    b = make_blocks(xs[0], N, size, tiles_E, tile, max_tiles)
    if scales:
        b = _whole_scale_groups(b, scales[0].shape[2])
    prefetch = b.schedule.expert_I, b.schedule.tile_I, jnp.asarray(layer, jnp.int32).reshape(1)
    operands = *prefetch, *xs, *values, *scales, *starts
    w_specs = _weight_specs(b, transposed, values, scales)
    return pl.pallas_call(
        functools.partial(_matmul_kernel, b, len(xs), transposed, bool(scales), bool(starts)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=b.grid,
            in_specs=[*[b.x_spec] * len(xs), *w_specs, *[b.y_spec] * len(starts)],
            out_specs=b.y_spec,
            scratch_shapes=[pltpu.VMEM((b.M, b.tn), jnp.float32)],
        ),
        out_shape=shape_like(xs[0], (P, N), dtype),
        compiler_params=b.compiler_params,
        cost_estimate=b.cost(len(xs)),
        input_output_aliases={len(operands) - 1: 0} if starts else {},
        interpret=interpret,
        name="grouped_matmul",
    )(*operands)


def _kernel_bytes(xs, values, scales, results: int) -> KernelBytes:
    """Bytes of the arrays, `results` of them of results."""
    rows = sum(x.dtype.itemsize for x in xs)
    weights = sum(jax.dtypes.itemsize_bits(w.dtype) for w in values) / 8
    row = max(x.dtype.itemsize for x in xs)
    if not scales:
        return KernelBytes(rows, weights, results, row=row)
    num_groups = scales[0].shape[2]
    converted = 4 if has_small_vmem() else row  # a v4 converts through 32 bits
    column = 2 * 4 * num_groups + converted * (xs[0].shape[1] // num_groups)
    return KernelBytes(rows, weights, results, sums=2 * 4, row=row, column=column)


def _whole_scale_groups(b: Blocks, num_scale_groups: int) -> Blocks:
    """Blocks that hold whole groups of scales, or lie in one."""
    group = b.K // num_scale_groups
    if b.tk % group and group % b.tk:
        return dataclasses.replace(b, tk=math.gcd(b.tk, group))
    return b


def _weight_specs(b: Blocks, transposed: bool, values, scales) -> list[pl.BlockSpec]:
    """Blocks of values (L, E, K, N), or (L, E, N, K) if `transposed`, and of scales (L, E, G,
    N)."""

    def w_index(n, i, k, expert, tile, layer):
        return layer[0], expert[i], *((n, k) if transposed else (k, n))

    w_shape = (None, None, *((b.tn, b.tk) if transposed else (b.tk, b.tn)))
    w_spec = pl.BlockSpec(w_shape, w_index, pipeline_mode=pl.Buffered(b.buffers))
    return [w_spec] * len(values) + [
        pl.BlockSpec(
            (None, None, a.shape[2], b.tn),
            lambda n, i, k, expert, tile, layer: (layer[0], expert[i], 0, n),
        )
        for a in scales
    ]


def _matmul_kernel(b: Blocks, products: int, transposed: bool, scaled: bool, starts: bool, *refs):
    """One block of K; `refs` are those of the operands, the result and its sum."""
    refs = refs[3:]  # without the prefetched scalars
    y_ref, sum_ref = refs[-2:]
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _():
        sum_ref[...] = refs[-3][...].astype(jnp.float32) if starts else jnp.zeros_like(sum_ref)

    for x_ref, w_ref in zip(refs, refs[products : 2 * products], strict=False):
        if scaled:
            sum_ref[...] += _dot_quantized(x_ref, w_ref, refs[2], k * b.tk, b.K)
        else:
            sum_ref[...] += dot(x_ref[...], w_ref[...], 1 if transposed else 0)

    @pl.when(k == b.K // b.tk - 1)
    def _():
        y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def _dot_quantized(x_ref, w_ref, scale_ref, row, K: int) -> jax.Array:
    """x w of a block of a quantised matrix of K rows that begins at `row`; its scales are all of
    them.

    Scales multiply the sum of their group: an integer is exact in the type of x, so that nothing is
    rounded but what a product with floats rounds.
    """
    rows = w_ref.shape[0]
    y_MN = jnp.zeros((x_ref.shape[0], w_ref.shape[1]), jnp.float32)
    scale_GN = scale_ref[...].astype(jnp.float32)
    group = K // len(scale_GN)
    index_GN = jax.lax.broadcasted_iota(jnp.int32, scale_GN.shape, 0)
    for start in range(0, rows, min(group, rows)):
        part = slice(start, start + min(group, rows))
        if rows == K:
            scale_1N = scale_GN[start // group : start // group + 1]
        else:  # a part of the rows that only the grid knows
            is_group_GN = index_GN == (row + start) // group
            scale_1N = jnp.sum(jnp.where(is_group_GN, scale_GN, 0), axis=0, keepdims=True)
        y_MN += dot(x_ref[:, part], w_ref[part, :].astype(x_ref.dtype), 0) * scale_1N
    return y_MN


def grouped_weight_gradient(
    x_PK, dy_PN, tiles_E, tile: int, *, dtype, interpret: Any = False
) -> jax.Array:
    """Sum over each expert's rows of x^T dy, (E, K, N), in float32 and then `dtype`."""
    return weight_gradient(
        functools.partial(
            jax.lax.dot_general,
            dimension_numbers=(((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        ),
        x_PK,
        dy_PN,
        (),
        tiles_E,
        tile,
        dtype=dtype,
        row_itemsize=max(x_PK.itemsize, dy_PN.itemsize),
        interpret=interpret,
        name="grouped_weight_gradient",
    )
