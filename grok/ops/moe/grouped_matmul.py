"""Products of tiles of rows with the matrix of each tile's expert: TPU kernels.

The weights stand still: a block of an expert's matrix is read once for all its tiles, and as int8
where it is int8.

Letters: E experts, I tiles, M rows of a tile, P = I*M places, K contracted axis, N columns,
G groups of scales, L layers.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from grok.ops.moe.routing import visits
from grok.ops.moe.tiling import gradient_blocks, like, vmem_limit, weight_blocks
from grok.ops.weights.int8 import QuantizedArray


def grouped_matmul_reference(x_PK, w_EKN, tiles_E, tile: int) -> jax.Array:
    """Each tile times its expert's matrix, y_PN in float32; zeros beyond the last tile."""
    w_EKN = w_EKN.dequantize(jnp.float32) if isinstance(w_EKN, QuantizedArray) else w_EKN
    x_IMK = x_PK.reshape(-1, tile, x_PK.shape[1])
    share_IE = _shares(tiles_E, len(x_IMK))
    y_IEMN = jnp.einsum("imk,ekn->iemn", x_IMK, w_EKN, preferred_element_type=jnp.float32)
    return jnp.einsum("ie,iemn->imn", share_IE, y_IEMN).reshape(len(x_PK), -1)


def weight_gradient_reference(x_PK, dy_PN, tiles_E, tile: int) -> jax.Array:
    """Sum over each expert's rows of x^T dy, (E, K, N) in float32."""
    x_IMK, dy_IMN = (a.astype(jnp.float32).reshape(-1, tile, a.shape[1]) for a in (x_PK, dy_PN))
    dw_IKN = jnp.einsum("imk,imn->ikn", x_IMK, dy_IMN)
    return jnp.einsum("ie,ikn->ekn", _shares(tiles_E, len(x_IMK)), dw_IKN)


def _shares(tiles_E, most: int) -> jax.Array:
    """1 where a tile is an expert's."""
    visit = visits(tiles_E, most)
    experts = jnp.arange(tiles_E.size)
    here_I = jnp.arange(most) < visit.steps
    is_IE = (visit.expert_I[:, None] == experts[None, :]) & here_I[:, None]
    return is_IE.astype(jnp.float32)


def grouped_matmul(
    xs: tuple[jax.Array, ...],
    ws: tuple[Any, ...],
    tiles_E: jax.Array,
    tile: int,
    *,
    dtype,
    transposed: bool = False,
    most: int | None = None,
    start: jax.Array | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Sum over pairs of x_PK and w_EKN of each tile times its expert's matrix, y_PN in `dtype`.

    `ws` are arrays, of shape (E, N, K) when `transposed`, or one QuantizedArray. Products are
    summed in float32, from `start` on if it is given, an array like y_PN, whose memory y_PN takes
    over. What lies beyond the last tile is not written. At most `most` tiles have rows, if it is
    given, and the kernel is said to cost no more.
    """
    scales: list[jax.Array] = []
    layer: Any = 0
    if isinstance(ws[0], QuantizedArray):
        layer, (values, scales) = _all_layers(ws[0])
    else:
        values = [w[None] for w in ws]
    (P, K), M = xs[0].shape, tile
    (E, _, _), N = values[0].shape[1:], values[0].shape[2 if transposed else 3]
    itemsizes = sum(w.dtype.itemsize for w in values)
    tk, tn, buffers = weight_blocks(K, N, itemsizes, P // M >= 4 * E)
    group = K // scales[0].shape[2] if scales else K
    if scales and tk % group and group % tk:
        tk = math.gcd(tk, group)
    visit = visits(tiles_E, P // M)
    steps = P // M if most is None else min(most, P // M)
    prefetch = (visit.expert_I, visit.tile_I, jnp.asarray(layer, jnp.int32).reshape(1))

    def w_block(n, i, k, expert, tile, layer):
        return layer[0], expert[i], *((n, k) if transposed else (k, n))

    def kernel(expert, tile, layer, *refs):
        y_ref, sum_ref = refs[-2:]
        k = pl.program_id(2)

        @pl.when(k == 0)
        def _():
            sum_ref[...] = refs[-3][...].astype(jnp.float32) if starts else jnp.zeros_like(sum_ref)

        for x_ref, w_ref in zip(refs, refs[len(xs) : 2 * len(xs)], strict=False):
            if scales:
                sum_ref[...] += _dot_int8(x_ref, w_ref, refs[2], k * tk, group)
            else:
                sum_ref[...] += dot(x_ref[...], w_ref[...], 1 if transposed else 0)

        @pl.when(k == K // tk - 1)
        def _():
            y_ref[...] = sum_ref[...].astype(dtype)

    w_shape = (None, None, *((tn, tk) if transposed else (tk, tn)))
    x_bytes, w_bytes = (sum(a.dtype.itemsize for a in arrays) for arrays in (xs, values))
    itemsize = jnp.dtype(dtype).itemsize
    starts = [] if start is None else [start]
    moved = (1 + len(starts)) * M * itemsize  # of a column, to memory and from it
    blocks = 2 * M * tk * x_bytes + 2 * moved * tn + buffers * tk * tn * w_bytes + 8 * M * tn
    y_spec = pl.BlockSpec((M, tn), lambda n, i, k, expert, tile, layer: (tile[i], n))
    before = len(prefetch) + len(xs) + len(values) + len(scales)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=(N // tn, visit.steps[0], K // tk),
            in_specs=[
                *[pl.BlockSpec((M, tk), lambda n, i, k, expert, tile, layer: (tile[i], k))]
                * len(xs),
                *[pl.BlockSpec(w_shape, w_block, pipeline_mode=pl.Buffered(buffers))] * len(values),
                *(
                    pl.BlockSpec(
                        (None, None, a.shape[2], tn),
                        lambda n, i, k, expert, tile, layer: (layer[0], expert[i], 0, n),
                    )
                    for a in scales
                ),
                *[y_spec] * len(starts),
            ],
            out_specs=y_spec,
            scratch_shapes=[pltpu.VMEM((M, tn), jnp.float32)],
        ),
        out_shape=like(xs[0], (P, N), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_limit(blocks),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * steps * M * K * N * len(xs),
            bytes_accessed=steps * M * K * x_bytes * (N // tn)
            + K * N * w_bytes * (min(E, steps) if tk == K else steps)
            + steps * moved * N,
            transcendentals=0,
        ),
        input_output_aliases={before: 0} if starts else {},
        interpret=interpret,
        name="grouped_matmul",
    )(*prefetch, *xs, *values, *scales, *starts)


def grouped_weight_gradient(
    x_PK: jax.Array,
    dy_PN: jax.Array,
    tiles_E: jax.Array,
    tile: int,
    *,
    dtype,
    interpret: Any = False,
) -> jax.Array:
    """Sum over each expert's rows of x^T dy, (E, K, N), in float32 and then `dtype`."""
    (P, K), N, M, E = x_PK.shape, dy_PN.shape[1], tile, tiles_E.size
    tk, tn = gradient_blocks(K, N)
    visit = visits(tiles_E, P // M + E, empty=1)

    def kernel(expert, tile, live, count, x_ref, dy_ref, dw_ref, sum_ref):
        i = pl.program_id(2)

        @pl.when((i == 0) | (expert[jnp.maximum(i - 1, 0)] != expert[i]))
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        @pl.when(live[i] > 0)
        def _():
            sum_ref[...] += jax.lax.dot_general(
                x_ref[...],
                dy_ref[...],
                (((0,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )

        last = count[0] - 1

        @pl.when((i == last) | (expert[jnp.minimum(i + 1, last)] != expert[i]))
        def _():
            dw_ref[...] = sum_ref[...].astype(dtype)

    itemsize = jnp.dtype(dtype).itemsize
    blocks = 2 * M * (tk * x_PK.dtype.itemsize + tn * dy_PN.dtype.itemsize)
    blocks += tk * tn * (2 * itemsize + 4 * 2)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visit),
            grid=(K // tk, N // tn, visit.steps[0]),
            in_specs=[
                pl.BlockSpec((M, tk), lambda k, n, i, expert, tile, *_: (tile[i], k)),
                pl.BlockSpec((M, tn), lambda k, n, i, expert, tile, *_: (tile[i], n)),
            ],
            out_specs=pl.BlockSpec((None, tk, tn), lambda k, n, i, expert, *_: (expert[i], k, n)),
            scratch_shapes=[pltpu.VMEM((tk, tn), jnp.float32)],
        ),
        out_shape=like(x_PK, (E, K, N), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem_limit(blocks),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * P * K * N,
            bytes_accessed=x_PK.nbytes * (N // tn)
            + dy_PN.nbytes * (K // tk)
            + E * K * N * itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="grouped_weight_gradient",
    )(*visit, x_PK, dy_PN)


def _all_layers(w: QuantizedArray):
    """The layer's number, and values and scales of all layers: a slice would be a copy first."""
    if w.layer is None:
        return 0, ([w.values[None]], [w.scales[None]])
    return w.layer, ([w.values], [w.scales])


def dot(x_MK, w, dim: int) -> jax.Array:
    """x w, contracting dimension `dim` of w, in float32."""
    return jax.lax.dot_general(
        x_MK, w, (((1,), (dim,)), ((), ())), preferred_element_type=jnp.float32
    )


def _dot_int8(x_ref, w_ref, scale_ref, row, group: int) -> jax.Array:
    """x w of a block of an int8 matrix that begins at `row`; its scales are those of all rows.

    Scales multiply the sum of their group: an int8 is exact in the type of x, so that nothing is
    rounded but what a product with floats rounds.
    """
    rows = w_ref.shape[0]
    y_MN = jnp.zeros((x_ref.shape[0], w_ref.shape[1]), jnp.float32)
    scale_GN = scale_ref[...].astype(jnp.float32)
    groups_GN = jax.lax.broadcasted_iota(jnp.int32, scale_GN.shape, 0)
    for start in range(0, rows, min(group, rows)):
        part = slice(start, start + min(group, rows))
        here_GN = groups_GN == (row + start) // group
        scale_N = jnp.sum(jnp.where(here_GN, scale_GN, 0), axis=0, keepdims=True)
        y_MN += dot(x_ref[:, part], w_ref[part, :].astype(x_ref.dtype), 0) * scale_N
    return y_MN
