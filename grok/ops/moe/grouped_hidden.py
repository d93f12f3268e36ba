"""The hidden layer of the experts in one TPU kernel: both products, and what joins them.

Rows are read once for two matrices, and where nothing is differentiated the two products never
leave the core. The form of `grok.ops.moe.grouped_matmul`, whose letters these are: E experts, I
tiles, M rows of a tile, P = I*M places, K contracted axis, N columns.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from grok.ops.moe.grouped_matmul import dot, grouped_matmul_reference
from grok.ops.moe.routing import visits
from grok.ops.moe.tiling import like, vmem_limit, weight_blocks

# Rows that are joined at a time, so that what is between fits into registers.
JOINED = 16


def grouped_hidden_reference(x_PK, w_gate_EKN, w_up_EKN, tiles_E, tile: int, *, join: Callable):
    """As `grouped_hidden` with `products`."""
    branch_PN, up_PN = (
        grouped_matmul_reference(x_PK, w, tiles_E, tile).astype(x_PK.dtype)
        for w in (w_gate_EKN, w_up_EKN)
    )
    return join(branch_PN, up_PN).astype(x_PK.dtype), branch_PN, up_PN


def grouped_hidden(
    x_PK: jax.Array,
    w_gate_EKN: jax.Array,
    w_up_EKN: jax.Array,
    tiles_E: jax.Array,
    tile: int,
    *,
    join: Callable,
    products: bool,
    most: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """`join(branch, up)` of each tile's products with its expert's matrices, hidden_PN, and with
    `products` also branch_PN and up_PN, all in the type of x.

    Products are summed in float32 and rounded to the type of x before `join`, which works on each
    number by itself and returns float32. What lies beyond the last tile is not written. `most` as
    of `grouped_matmul`.
    """
    (P, K), (E, _, N), M, dtype = x_PK.shape, w_gate_EKN.shape, tile, x_PK.dtype
    itemsize = dtype.itemsize
    tk, tn, buffers = weight_blocks(K, N, 2 * w_gate_EKN.dtype.itemsize, P // M >= 4 * E)
    visit = visits(tiles_E, P // M)
    steps = P // M if most is None else min(most, P // M)

    def kernel(expert, tile, x_ref, gate_ref, up_ref, *refs):
        *out_refs, branch_ref, sum_ref = refs
        k = pl.program_id(2)

        @pl.when(k == 0)
        def _():
            branch_ref[...] = jnp.zeros_like(branch_ref)
            sum_ref[...] = jnp.zeros_like(sum_ref)

        branch_ref[...] += dot(x_ref[...], gate_ref[...], 0)
        sum_ref[...] += dot(x_ref[...], up_ref[...], 0)

        @pl.when(k == K // tk - 1)
        def _():
            @pl.loop(0, M, step=JOINED)
            def _(row):
                rows = pl.ds(row, JOINED)
                parts = branch_ref[rows, :].astype(dtype), sum_ref[rows, :].astype(dtype)
                out_refs[0][rows, :] = join(*parts).astype(dtype)
                for ref, part in zip(out_refs[1:], parts, strict=False):
                    ref[rows, :] = part

    outputs = 3 if products else 1
    blocks = 2 * M * (tk + outputs * tn) * itemsize + 2 * 4 * M * tn
    blocks += 2 * buffers * tk * tn * w_gate_EKN.dtype.itemsize
    w_spec = pl.BlockSpec(
        (None, tk, tn),
        lambda n, i, k, expert, tile: (expert[i], k, n),
        pipeline_mode=pl.Buffered(buffers),
    )
    y_spec = pl.BlockSpec((M, tn), lambda n, i, k, expert, tile: (tile[i], n))
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(N // tn, visit.steps[0], K // tk),
            in_specs=[
                pl.BlockSpec((M, tk), lambda n, i, k, expert, tile: (tile[i], k)),
                w_spec,
                w_spec,
            ],
            out_specs=(y_spec,) * outputs,
            scratch_shapes=[pltpu.VMEM((M, tn), jnp.float32)] * 2,
        ),
        out_shape=(like(x_PK, (P, N), dtype),) * outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_limit(blocks),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * 2 * steps * M * K * N,
            bytes_accessed=steps * M * K * itemsize * (N // tn)
            + 2 * K * N * w_gate_EKN.dtype.itemsize * (min(E, steps) if tk == K else steps)
            + outputs * steps * M * N * itemsize,
            transcendentals=steps * M * N,
        ),
        interpret=interpret,
        name="grouped_hidden",
    )(visit.expert_I, visit.tile_I, x_PK, w_gate_EKN, w_up_EKN)
