"""Blocks of rows and weights, and their costs, as all grouped kernels have them.

Letters: E experts, I tiles, M rows of a tile, P = I*M slots, K contracted axis, N columns.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from grok.ops.moe.routing import TileSchedule, tile_schedule
from grok.ops.moe.tiling import KernelBytes, vmem_limit, weight_blocks


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

    @property
    def x_spec(self) -> pl.BlockSpec:
        """The block of rows (P, K) of a step."""
        return pl.BlockSpec((self.M, self.tk), lambda n, i, k, expert, tile, *_: (tile[i], k))

    @property
    def y_spec(self) -> pl.BlockSpec:
        """The block of results (P, N) of a step."""
        return pl.BlockSpec((self.M, self.tn), lambda n, i, k, expert, tile, *_: (tile[i], n))

    def cost(self, products: int, transcendentals: int = 0) -> pl.CostEstimate:
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
    def compiler_params(self) -> pltpu.CompilerParams:
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
) -> pltpu.CompilerParams:
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
