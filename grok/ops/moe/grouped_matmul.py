"""Products of tiles of rows with the matrix of each tile's expert: TPU kernels.

Weights are stationary: a block of an expert's matrix is read once for all its tiles, and as int8 or
int4 where it is that. Rows may be int8, too, and are then multiplied as integers. Letters as in
`grok.ops.moe.grouped_blocks`, and G groups of scales, L layers.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from grok.hardware import has_small_vmem
from grok.ops.moe.grouped_blocks import (
    SCALE_BYTES,
    Blocks,
    column_of,
    dot,
    make_blocks,
    weight_gradient,
)
from grok.ops.moe.routing import tile_schedule
from grok.ops.moe.tiling import KernelBytes
from grok.ops.pallas import pl, pltpu
from grok.ops.scaled import integer_dot
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
    row_scales: jax.Array | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Sum over pairs of x_PK and w_EKN of each tile times its expert's matrix, y_PN in `dtype`.

    `ws` are arrays, of shape (E, N, K) when `transposed`, or one QuantizedArray. Products are
    summed in float32, from `start` on if given, an array like y_PN that y_PN overwrites. Slots
    after the last tile are not written. `max_tiles` bounds the tiles with rows, for the cost
    estimate. With `row_scales` (P, G), float32, the rows are int8 and the matrices a
    QuantizedArray: products are of int8 values, in int32 up to the end of a group of either.
    """
    layer, _, w_scales = kernel_operands(ws[0])
    values = [kernel_operands(w)[1] for w in ws]
    scales = [] if w_scales is None else [w_scales]
    P, N = len(xs[0]), values[0].shape[2 if transposed else 3]
    starts, x_scales = ([] if array is None else [array] for array in (start, row_scales))
    results = (1 + len(starts)) * jnp.dtype(dtype).itemsize  # written, and read as the start
    size = _kernel_bytes(xs, values, scales, x_scales, results)
    b = make_blocks(xs[0], N, size, tiles_E, tile, max_tiles)
    b = b.with_groups(*(a.shape[2] for a in scales), *(a.shape[1] for a in x_scales))
    prefetch = b.schedule.expert_I, b.schedule.tile_I, jnp.asarray(layer, jnp.int32).reshape(1)
    operands = *prefetch, *xs, *values, *scales, *x_scales, *starts
    in_specs = [
        *[b.x_spec] * len(xs),
        *b.weight_specs(transposed, values, scales),
        *(b.scales_spec(array.shape[1]) for array in x_scales),
        *[b.y_spec] * len(starts),
    ]
    multiply = _multiply(len(xs), transposed, bool(scales), bool(x_scales))
    return pl.pallas_call(
        functools.partial(_matmul_kernel, b, multiply, bool(starts)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=b.grid,
            in_specs=in_specs,
            out_specs=b.y_spec,
            scratch_shapes=[pltpu.VMEM((b.M, b.tn), jnp.float32)],
        ),
        out_shape=shape_like(xs[0], (P, N), dtype),
        compiler_params=b.compiler_params,
        cost_estimate=b.cost(len(xs)),
        input_output_aliases={len(operands) - 1: 0} if starts else {},
        interpret=interpret,
        name="scaled_grouped_matmul" if x_scales else "grouped_matmul",
    )(*operands)


def _kernel_bytes(xs, values, scales, x_scales, results: int) -> KernelBytes:
    """Bytes of the arrays, `results` of them of results."""
    rows = sum(x.dtype.itemsize for x in xs)
    weights = sum(jax.dtypes.itemsize_bits(w.dtype) for w in values) / 8
    row = max(x.dtype.itemsize for x in xs)
    if not scales:
        return KernelBytes(rows, weights, results, row=row)
    num_groups = scales[0].shape[2]
    converted = 4 if has_small_vmem() else row  # a v4 converts through 32 bits
    column = 2 * 4 * num_groups + converted * (xs[0].shape[1] // num_groups)
    row_scales = SCALE_BYTES * len(x_scales)
    sums = (2 + len(x_scales)) * 4  # with a product in int32
    return KernelBytes(rows, weights, results, sums, row, column, row_scales)


def _matmul_kernel(b: Blocks, multiply: Callable, starts: bool, *refs):
    """One block of K; `refs` are those of the operands, the result and its sum."""
    refs = refs[3:]  # without the prefetched scalars
    y_ref, sum_ref = refs[-2:]
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _():
        sum_ref[...] = refs[-3][...].astype(jnp.float32) if starts else jnp.zeros_like(sum_ref)

    for product in multiply(b, refs, k):
        sum_ref[...] += product()

    @pl.when(k == b.K // b.tk - 1)
    def _():
        y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def _multiply(pairs: int, transposed: bool, scaled: bool, has_row_scales: bool) -> Callable:
    """Functions without arguments that compute the products of block k of the contracted axis."""

    def floats(b: Blocks, refs, k) -> list[Callable]:
        refs_of_pairs = zip(refs, refs[pairs : 2 * pairs], strict=False)
        return [functools.partial(_dot_floats, *pair, int(transposed)) for pair in refs_of_pairs]

    def quantized(b: Blocks, refs, k) -> list[Callable]:
        x_ref, w_ref, scale_ref, *_ = refs
        return [lambda: _dot_quantized(x_ref, w_ref, scale_ref, k * b.tk, b.K)]

    def integers(b: Blocks, refs, k) -> list[Callable]:
        x_ref, w_ref, scale_ref, row_scale_ref, *_ = refs
        return [lambda: dot_integers(x_ref, w_ref, scale_ref, row_scale_ref, k * b.tk, b.K)]

    if not scaled:
        return floats
    return integers if has_row_scales else quantized


def _dot_floats(x_ref, w_ref, contract_dim: int) -> jax.Array:
    return dot(x_ref[...], w_ref[...], contract_dim)


def _dot_quantized(x_ref, w_ref, scale_ref, row, K: int) -> jax.Array:
    """x w of a block of a quantised matrix of K rows that begins at `row`; its scales are all of
    them.

    Scales multiply the sum of their group: an integer is exact in the type of x, so that nothing is
    rounded but what a product with floats rounds.
    """
    rows = w_ref.shape[0]
    y_MN = jnp.zeros((x_ref.shape[0], w_ref.shape[1]), jnp.float32)
    for part, scale_1N in _groups(scale_ref, rows, row, K):
        y_MN += dot(x_ref[:, part], w_ref[part, :].astype(x_ref.dtype), 0) * scale_1N
    return y_MN


def dot_integers(x_ref, w_ref, scale_ref, row_scale_ref, row, K: int) -> jax.Array:
    """x w of a block of a quantised matrix, as of `_dot_quantized`, and of int8 rows, which are
    multiplied by their scales (M, G), all of them, unless that is None."""
    rows, row_groups = w_ref.shape[0], 1 if row_scale_ref is None else row_scale_ref.shape[1]
    row_group = K // row_groups
    zeros_MN = jnp.zeros((x_ref.shape[0], w_ref.shape[1]), jnp.float32)
    y_MN, sum_MN = zeros_MN, zeros_MN
    for part, scale_1N in _groups(scale_ref, rows, row, K, row_group):
        product = integer_dot(x_ref[:, part], w_ref[part, :].astype(jnp.int8))
        sum_MN += product.astype(jnp.float32) * scale_1N
        if row_scale_ref is not None and part.stop % min(row_group, rows) == 0:
            y_MN += sum_MN * column_of(row_scale_ref, (row + part.start) // row_group)
            sum_MN = zeros_MN
    return sum_MN if row_scale_ref is None else y_MN


def _groups(scale_ref, rows: int, row, K: int, multiple: int = 0) -> Iterator[tuple]:
    """Parts of a block of `rows` rows from `row` on, each in one group of scales, and in one of
    `multiple` rows; with the scales of the part, (1, N)."""
    scale_GN = scale_ref[...].astype(jnp.float32)
    group = K // len(scale_GN)
    index_GN = jax.lax.broadcasted_iota(jnp.int32, scale_GN.shape, 0)
    length = min(math.gcd(group, multiple), rows)
    for start in range(0, rows, length):
        if rows == K:
            scale_1N = scale_GN[start // group : start // group + 1]
        else:  # a part of the rows that only the grid knows
            is_group_GN = index_GN == (row + start) // group
            scale_1N = jnp.sum(jnp.where(is_group_GN, scale_GN, 0), axis=0, keepdims=True)
        yield slice(start, start + length), scale_1N


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
