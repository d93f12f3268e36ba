"""Products of tiles of 8-bit rows with the 8-bit matrix of each tile's expert: TPU kernels, and the
same in plain XLA.

Letters as in `grok.ops.moe.grouped_blocks`, and G groups of the contracted axis.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from grok.ops.float8 import as_bytes, from_bytes
from grok.ops.moe.grouped_blocks import SCALE_BYTES, Blocks, column_of, make_blocks
from grok.ops.moe.routing import tile_schedule
from grok.ops.moe.tiling import KernelBytes
from grok.ops.pallas import pl, pltpu
from grok.ops.scaled import Scaled, scaled_dot
from grok.ops.varying import shape_like


def map_tiles(f: Callable, tiles_E, tile: int, *arrays: jax.Array) -> Any:
    """`f(expert, *rows)` of each tile of `arrays` (P, ...), the results beside each other."""
    expert_I = tile_schedule(tiles_E, len(arrays[0]) // tile).expert_I
    tiles = [a.reshape(-1, tile, *a.shape[1:]) for a in arrays]
    shapes = jax.eval_shape(f, expert_I[0], *(a[0] for a in tiles))
    results = jax.lax.map(lambda a: jax.tree.map(as_bytes, f(*a)), (expert_I, *tiles))
    results = jax.tree.map(lambda a, shape: from_bytes(a, shape.dtype), results, shapes)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), results)


def scaled_matmul_xla(
    xs: tuple[Scaled, ...],
    ws: tuple[Scaled, ...],
    tiles_E,
    tile: int,
    *,
    dtype,
    transposed: bool = False,
    start: jax.Array | None = None,
) -> jax.Array:
    """As `scaled_matmul`; slots after the last tile may hold anything."""
    starts = [] if start is None else [start]

    def one_tile(expert, *arrays):
        values, scales, starts = (
            arrays[: len(xs)],
            arrays[len(xs) : 2 * len(xs)],
            arrays[2 * len(xs) :],
        )
        pairs = zip(map(Scaled, values, scales), ws, strict=True)
        products = [_tile_product(x, w.values[expert], transposed) for x, w in pairs]
        y_MN = functools.reduce(jnp.add, products)
        if ws[0].scales is not None:
            y_MN *= ws[0].scales[expert][None, :]
        for start_MN in starts:
            y_MN += start_MN.astype(jnp.float32)
        return y_MN.astype(dtype)

    arrays = *(x.values for x in xs), *(x.scales for x in xs), *starts
    return map_tiles(one_tile, tiles_E, tile, *arrays)


def _tile_product(x: Scaled, w: jax.Array, transposed: bool) -> jax.Array:
    """Sum over groups of columns of x times rows of w, (M, N) float32."""
    groups = x.scales.shape[1]
    group = x.values.shape[1] // groups
    y_MN = jnp.zeros((), jnp.float32)
    for g in range(groups):
        part = slice(g * group, (g + 1) * group)
        w_part = w[:, part] if transposed else w[part]
        product = scaled_dot(x.values[:, part], w_part, 1, int(transposed))
        y_MN += product * x.scales[:, g : g + 1]
    return y_MN


def scaled_matmul(
    xs: tuple[Scaled, ...],
    ws: tuple[Scaled, ...],
    tiles_E,
    tile: int,
    *,
    dtype,
    transposed: bool = False,
    max_tiles: int | None = None,
    start: jax.Array | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Sum over pairs of rows and matrices of each tile times its expert's matrix, y_PN in `dtype`.

    Rows have values (P, K) and scales (P, G); matrices values (E, K, N), or (E, N, K) when
    `transposed`, and the first scales (E, N), or none have any. Products are summed in float32, to
    `start` if given, an array like y_PN that y_PN overwrites. Slots after the last tile are not
    written. `max_tiles` as of `grouped_matmul`.
    """
    values = [w.values for w in ws]
    P, N = len(xs[0].values), values[0].shape[1 if transposed else 2]
    scales = [] if ws[0].scales is None else [ws[0].scales[:, None, :]]
    starts = [] if start is None else [start]
    results = (1 + len(starts)) * jnp.dtype(dtype).itemsize
    pairs = len(xs)
    size = KernelBytes(pairs, pairs, results, 2 * 4, 1, 2 * 4 * 8, SCALE_BYTES * pairs)
    b = make_blocks(xs[0].values, N, size, tiles_E, tile, max_tiles)
    b = b.with_groups(xs[0].scales.shape[1])
    group = b.K // xs[0].scales.shape[1]
    prefetch = b.schedule.expert_I, b.schedule.tile_I
    rows = [a for x in xs for a in x]
    operands = *prefetch, *rows, *values, *scales, *starts
    return pl.pallas_call(
        functools.partial(_kernel, b, pairs, group, transposed, bool(scales), bool(starts)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=b.grid,
            in_specs=[
                *[b.x_spec, b.scales_spec(xs[0].scales.shape[1])] * pairs,
                *[weight_spec(b, transposed)] * pairs,
                *[columns_spec(b)] * len(scales),
                *[b.y_spec] * len(starts),
            ],
            out_specs=b.y_spec,
            scratch_shapes=[pltpu.VMEM((b.M, b.tn), jnp.float32)],
        ),
        out_shape=shape_like(xs[0].values, (P, N), dtype),
        compiler_params=b.compiler_params,
        cost_estimate=b.cost(pairs),
        input_output_aliases={len(operands) - 1: 0} if starts else {},
        interpret=interpret,
        name="scaled_matmul",
    )(*operands)


def weight_spec(b: Blocks, transposed: bool = False) -> "pl.BlockSpec":
    """The block of weights (E, K, N), or (E, N, K) when `transposed`, of a step."""

    def index(n, i, k, expert, tile):
        return expert[i], *((n, k) if transposed else (k, n))

    shape = (None, *((b.tn, b.tk) if transposed else (b.tk, b.tn)))
    return pl.BlockSpec(shape, index, pipeline_mode=pl.Buffered(b.buffers))


def columns_spec(b: Blocks) -> "pl.BlockSpec":
    """The scales (E, 1, N) of the columns of a step."""
    return pl.BlockSpec((None, 1, b.tn), lambda n, i, k, expert, tile: (expert[i], 0, n))


def _kernel(b: Blocks, pairs: int, group: int, transposed: bool, scaled: bool, starts: bool, *refs):
    """One block of K; `refs` are those of the operands, the result and its sum."""
    refs = refs[2:]  # without the prefetched scalars
    y_ref, sum_ref = refs[-2:]
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    for pair in range(pairs):
        x_ref, scale_ref, w_ref = refs[2 * pair], refs[2 * pair + 1], refs[2 * pairs + pair]
        for start in range(0, b.tk, min(group, b.tk)):
            part = slice(start, start + min(group, b.tk))
            w = w_ref[:, part] if transposed else w_ref[part, :]
            product = scaled_dot(x_ref[:, part], w, 1, int(transposed))
            sum_ref[...] += product * column_of(scale_ref, (k * b.tk + start) // group)

    @pl.when(k == b.K // b.tk - 1)
    def _():
        y_MN = sum_ref[...]
        if scaled:
            y_MN = y_MN * refs[3 * pairs][...]
        if starts:
            y_MN += refs[-3][...].astype(jnp.float32)
        y_ref[...] = y_MN.astype(y_ref.dtype)
