"""Blocks of rows and weights and their costs, and the kernel of weight gradients, of any type.

Letters: E experts, I tiles, M rows of a tile, P = I*M slots, K contracted axis, N columns.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from grok.hardware import LANES
from grok.ops.moe.routing import TileSchedule, tile_schedule
from grok.ops.moe.tiling import KernelBytes, gradient_blocks, vmem_limit, weight_blocks
from grok.ops.pallas import pl, pltpu
from grok.ops.varying import shape_like

SCALE_BYTES = LANES * 4  # of a row's scales, which fill lanes in memory


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The grid (N / tn, steps, K / tk) of a kernel that multiplies tiles by the matrix of their
    expert, and its blocks (M, tk) of rows, (tk, tn) of weights and (M, tn) of results."""

    E: int
    M: int
    K: int
    N: int
    tk: int
    tn: int
    buffers: int  # of a block of weights
    size: KernelBytes
    max_tiles: int
    schedule: TileSchedule

    @property
    def grid(self) -> tuple:
        """Blocks of columns, tiles, blocks of the contracted axis."""
        return self.N // self.tn, self.schedule.num_steps[0], self.K // self.tk

    def with_columns(self, multiple: int) -> "Blocks":
        """Blocks of fewer columns, a multiple of `multiple`, which divides N."""
        largest = max(self.tn // multiple, 1)
        groups = self.N // multiple
        per_block = next(n for n in range(largest, 0, -1) if groups % n == 0)
        return dataclasses.replace(self, tn=per_block * multiple)

    def with_groups(self, *groups: int) -> "Blocks":
        """Blocks that hold whole groups of the contracted axis, or lie in one, for each of these
        numbers of groups."""
        rows = [self.K // number for number in groups]
        if any(self.tk % group and group % self.tk for group in rows):
            return dataclasses.replace(self, tk=math.gcd(self.tk, *rows))
        return self

    @property
    def x_spec(self) -> "pl.BlockSpec":
        """The block of rows (P, K) of a step."""
        return pl.BlockSpec((self.M, self.tk), lambda n, i, k, expert, tile, *_: (tile[i], k))

    @property
    def y_spec(self) -> "pl.BlockSpec":
        """The block of results (P, N) of a step."""
        return pl.BlockSpec((self.M, self.tn), lambda n, i, k, expert, tile, *_: (tile[i], n))

    def scales_spec(self, groups: int) -> "pl.BlockSpec":
        """The scales (P, groups) of the rows of a step."""
        return pl.BlockSpec((self.M, groups), lambda n, i, k, expert, tile, *_: (tile[i], 0))

    def weight_specs(self, transposed: bool, values, scales) -> "list[pl.BlockSpec]":
        """Blocks of values (L, E, K, N), or (L, E, N, K) if `transposed`, and of scales (L, E, G,
        N), of the layer whose index is prefetched behind the schedule."""

        def w_index(n, i, k, expert, tile, layer):
            return layer[0], expert[i], *((n, k) if transposed else (k, n))

        w_shape = (None, None, *((self.tn, self.tk) if transposed else (self.tk, self.tn)))
        w_spec = pl.BlockSpec(w_shape, w_index, pipeline_mode=pl.Buffered(self.buffers))
        return [w_spec] * len(values) + [
            pl.BlockSpec(
                (None, None, a.shape[2], self.tn),
                lambda n, i, k, expert, tile, layer: (layer[0], expert[i], 0, n),
            )
            for a in scales
        ]

    def cost(self, products: int, transcendentals: int = 0) -> "pl.CostEstimate":
        """Cost of `products` products."""
        tiles, M, K, N = self.max_tiles, self.M, self.K, self.N
        weight_reads = min(self.E, tiles) if self.tk == K else tiles
        return pl.CostEstimate(
            flops=2 * products * tiles * M * K * N,
            bytes_accessed=tiles * M * (K * self.size.rows + self.size.row_scales) * (N // self.tn)
            + int(K * N * self.size.weights) * weight_reads
            + tiles * M * N * self.size.results,
            transcendentals=transcendentals * tiles * M * N,
        )

    @property
    def compiler_params(self) -> "pltpu.CompilerParams":
        """Parameters for a grid of which only blocks of columns are independent."""
        sides = self.M, self.tk, self.tn, self.buffers
        return compiler_params(1, self.size.of_blocks(*sides), self.size.required(*sides))


def make_blocks(
    x_PK: jax.Array,
    N: int,
    size: KernelBytes,
    tiles_E: jax.Array,
    tile: int,
    max_tiles: int | None,
) -> Blocks:
    """Blocks for rows in tiles of `tile`."""
    (P, K), E = x_PK.shape, tiles_E.size
    tk, tn, buffers = weight_blocks(tile, K, N, size, P // tile >= 4 * E)
    max_tiles = P // tile if max_tiles is None else min(max_tiles, P // tile)
    schedule = tile_schedule(tiles_E, P // tile)
    return Blocks(E, tile, K, N, tk, tn, buffers, size, max_tiles, schedule)


def compiler_params(
    parallel_dims: int, block_bytes: int, required: int = 0, dims: int = 3
) -> "pltpu.CompilerParams":
    """Parameters for a grid of `dims` dimensions, the first `parallel_dims` of them independent,
    and for blocks that take `block_bytes` where the compiler takes `required`."""
    semantics: Any = ["parallel" if dim < parallel_dims else "arbitrary" for dim in range(dims)]
    return pltpu.CompilerParams(
        dimension_semantics=semantics, vmem_limit_bytes=vmem_limit(block_bytes, required)
    )


def dot(x_MK: jax.Array, w: jax.Array, contract_dim: int) -> jax.Array:
    """x w, contracting dimension `contract_dim` of w, in float32."""
    return jax.lax.dot_general(
        x_MK, w, (((1,), (contract_dim,)), ((), ())), preferred_element_type=jnp.float32
    )


def weight_gradient(
    product: Callable,
    x_PK: jax.Array,
    dy_PN: jax.Array,
    scales: Sequence[jax.Array],
    tiles_E: jax.Array,
    tile: int,
    *,
    dtype: Any,
    row_itemsize: int,
    max_tiles: int | None = None,
    interpret: Any = False,
    name: str,
) -> jax.Array:
    """Sum over each expert's tiles of `product(x_MK, dy_MN, *scales_1N)`, (E, K, N), in float32 and
    then `dtype`. `scales` are (I, 1, N). A row takes `row_itemsize` bytes for each of its numbers
    beside the sum; `max_tiles` as of `grouped_matmul`."""
    (P, K), N, M, E = x_PK.shape, dy_PN.shape[1], tile, tiles_E.size
    itemsize = jnp.dtype(dtype).itemsize
    tk, tn = gradient_blocks(M, K, N, itemsize, row_itemsize)
    schedule = tile_schedule(tiles_E, P // M + E, empty=1)
    block_bytes = 2 * M * (tk * x_PK.itemsize + tn * dy_PN.itemsize)
    block_bytes += tk * tn * (2 * itemsize + 4 * 2)
    rows = P if max_tiles is None else M * min(max_tiles, P // M)
    row_bytes = K * x_PK.itemsize * (N // tn) + N * dy_PN.itemsize * (K // tk)
    return pl.pallas_call(
        functools.partial(_weight_gradient_kernel, product),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(schedule),
            grid=(K // tk, N // tn, schedule.num_steps[0]),
            in_specs=[
                pl.BlockSpec((M, tk), lambda k, n, i, expert, tile, *_: (tile[i], k)),
                pl.BlockSpec((M, tn), lambda k, n, i, expert, tile, *_: (tile[i], n)),
                *[pl.BlockSpec((None, 1, tn), lambda k, n, i, expert, tile, *_: (tile[i], 0, n))]
                * len(scales),
            ],
            out_specs=pl.BlockSpec((None, tk, tn), lambda k, n, i, expert, *_: (expert[i], k, n)),
            scratch_shapes=[pltpu.VMEM((tk, tn), jnp.float32)],
        ),
        out_shape=shape_like(x_PK, (E, K, N), dtype),
        compiler_params=compiler_params(2, block_bytes),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * K * N,
            bytes_accessed=rows * row_bytes + E * K * N * itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name=name,
    )(*schedule, x_PK, dy_PN, *scales)


def _weight_gradient_kernel(product, expert, tile, has_rows, num_steps, *refs):
    """One tile; the gradient of an expert is written after its last. `refs` are those of the
    operands, the result and its sum."""
    *operands, dw_ref, sum_ref = refs
    i = pl.program_id(2)

    @pl.when((i == 0) | (expert[jnp.maximum(i - 1, 0)] != expert[i]))
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(has_rows[i] > 0)
    def _():
        sum_ref[...] += product(*(ref[...] for ref in operands))

    last = num_steps[0] - 1

    @pl.when((i == last) | (expert[jnp.minimum(i + 1, last)] != expert[i]))
    def _():
        dw_ref[...] = sum_ref[...].astype(dw_ref.dtype)


def column_of(ref, index) -> jax.Array:
    """One column (M, 1) of scales (M, G); the grid may know which alone."""
    scale_MG = ref[...]
    if scale_MG.shape[1] == 1:
        return scale_MG
    is_column = jax.lax.broadcasted_iota(jnp.int32, scale_MG.shape, 1) == index
    return jnp.sum(jnp.where(is_column, scale_MG, 0), axis=1, keepdims=True)
