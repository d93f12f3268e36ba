"""The hidden layer of the experts in one TPU kernel: both products, and their gated activation.

Rows are read once for two matrices, and where nothing is differentiated the two products never
leave the core. Letters as in `grok.ops.moe.grouped_blocks`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from grok.ops.moe.grouped_blocks import Blocks, dot, make_blocks
from grok.ops.moe.grouped_matmul import grouped_matmul_reference
from grok.ops.moe.tiling import KernelBytes
from grok.ops.pallas import pl, pltpu
from grok.ops.varying import shape_like

ROWS_PER_STORE = 16  # rows activated at a time, so that intermediates fit into registers


def grouped_hidden_reference(x_PK, w_gate_EKN, w_up_EKN, tiles_E, tile: int, *, activation):
    """As `grouped_hidden` with `keep_products`."""
    gate_PN, up_PN = (
        grouped_matmul_reference(x_PK, w, tiles_E, tile).astype(x_PK.dtype)
        for w in (w_gate_EKN, w_up_EKN)
    )
    return activation(gate_PN, up_PN).astype(x_PK.dtype), gate_PN, up_PN


def grouped_hidden(
    x_PK,
    w_gate_EKN,
    w_up_EKN,
    tiles_E,
    tile: int,
    *,
    activation: Callable,
    keep_products: bool,
    max_tiles: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """`activation(gate, up)` of each tile's products with its expert's matrices, hidden_PN, and
    with `keep_products` also gate_PN and up_PN, all in the type of x.

    Products are summed in float32 and rounded to the type of x before `activation`, which is
    elementwise and returns float32. Slots after the last tile are not written. `max_tiles` as of
    `grouped_matmul`.
    """
    P, N, itemsize, w_itemsize = len(x_PK), w_up_EKN.shape[2], x_PK.itemsize, w_up_EKN.itemsize
    outputs = 3 if keep_products else 1
    size = KernelBytes(itemsize, 2 * w_itemsize, outputs * itemsize, sums=2 * 4, row=itemsize)
    b = make_blocks(x_PK, N, size, tiles_E, tile, max_tiles)
    w_spec = pl.BlockSpec(
        (None, b.tk, b.tn),
        lambda n, i, k, expert, tile: (expert[i], k, n),
        pipeline_mode=pl.Buffered(b.buffers),
    )
    return pl.pallas_call(
        functools.partial(_kernel, b, activation),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=b.grid,
            in_specs=[b.x_spec, w_spec, w_spec],
            out_specs=(b.y_spec,) * outputs,
            scratch_shapes=[pltpu.VMEM((b.M, b.tn), jnp.float32)] * 2,
        ),
        out_shape=(shape_like(x_PK, (P, N), x_PK.dtype),) * outputs,
        compiler_params=b.compiler_params,
        cost_estimate=b.cost(2, transcendentals=1),
        interpret=interpret,
        name="grouped_hidden",
    )(b.schedule.expert_I, b.schedule.tile_I, x_PK, w_gate_EKN, w_up_EKN)


def _kernel(b: Blocks, activation, expert, tile, x_ref, w_gate_ref, w_up_ref, *refs):
    """One block of K; `refs` are those of the results and of the two sums."""
    *out_refs, gate_ref, up_ref = refs
    dtype, k = x_ref.dtype, pl.program_id(2)

    @pl.when(k == 0)
    def _():
        gate_ref[...] = jnp.zeros_like(gate_ref)
        up_ref[...] = jnp.zeros_like(up_ref)

    gate_ref[...] += dot(x_ref[...], w_gate_ref[...], 0)
    up_ref[...] += dot(x_ref[...], w_up_ref[...], 0)

    @pl.when(k == b.K // b.tk - 1)
    def _():
        @pl.loop(0, b.M, step=ROWS_PER_STORE)
        def _(row):
            rows = pl.ds(row, ROWS_PER_STORE)
            products = gate_ref[rows, :].astype(dtype), up_ref[rows, :].astype(dtype)
            out_refs[0][rows, :] = activation(*products).astype(dtype)
            for ref, product in zip(out_refs[1:], products, strict=False):
                ref[rows, :] = product
