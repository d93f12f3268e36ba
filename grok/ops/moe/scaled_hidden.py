"""The hidden layer of the experts of 8-bit rows and matrices in one TPU kernel: both products, and
either their gated activation in 8 bits, or the products themselves for the backward pass. Matrices
of a model that serves may have scales for groups of rows, and be int4.

Letters as in `grok.ops.moe.grouped_blocks`, and G groups of columns, L layers.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from grok.ops.moe.grouped_blocks import SCALE_BYTES, Blocks, make_blocks
from grok.ops.moe.grouped_matmul import dot_integers
from grok.ops.moe.scaled_matmul import map_tiles
from grok.ops.moe.tiling import KernelBytes
from grok.ops.pallas import pl, pltpu
from grok.ops.scaled import Scaled, group_columns, quantize, quantize_groups, scaled_dot
from grok.ops.varying import shape_like
from grok.ops.weights.quantized import QuantizedArray
from grok.ops.weights.weight import kernel_operands

ROWS_PER_STORE = 32  # rows finished at a time, as many as share a register of 8-bit values


def scaled_hidden_xla(
    x: Scaled, gate: Scaled, up: Scaled, tiles_E, tile: int, *, dtype, activation: Callable
) -> Scaled:
    """As `scaled_hidden`; slots after the last tile may hold anything."""

    def one_tile(expert, values, scales):
        products = _products(expert, Scaled(values, scales), gate, up, dtype)
        hidden_MN = activation(*products)
        return quantize_groups(hidden_MN, group_columns(hidden_MN.shape[1]), values.dtype)

    return map_tiles(one_tile, tiles_E, tile, *x)


def scaled_products_xla(
    x: Scaled, gate: Scaled, up: Scaled, tiles_E, tile: int, *, dtype
) -> tuple[jax.Array, jax.Array]:
    """As `scaled_products`; slots after the last tile may hold anything."""

    def one_tile(expert, values, scales):
        return tuple(_products(expert, Scaled(values, scales), gate, up, dtype))

    return map_tiles(one_tile, tiles_E, tile, *x)


def _products(expert, x: Scaled, gate: Scaled, up: Scaled, dtype) -> list[jax.Array]:
    """A tile's products with both matrices of its expert."""
    products = []
    for w in (gate, up):
        product = scaled_dot(x.values, w.values[expert]) * x.scales * w.scales[expert][None, :]
        products.append(product.astype(dtype))
    return products


def scaled_hidden(
    x: Scaled,
    gate: Scaled | QuantizedArray,
    up: Scaled | QuantizedArray,
    tiles_E,
    tile: int,
    *,
    dtype,
    activation: Callable,
    max_tiles: int | None = None,
    interpret: Any = False,
) -> Scaled:
    """`activation(gate, up)` of each tile's products with its expert's matrices, in the 8 bits of
    x: values (P, N) and scales (P, G).

    Rows have values (P, K) and a scale each (P, 1), matrices values (E, K, N) and scales (E, N), or
    those of a QuantizedArray, for int8 rows. Products are rounded to `dtype` before `activation`,
    which is elementwise and returns float32. Slots after the last tile are not written.
    """
    P, N, values_dtype = len(x.values), gate.values.shape[-1], x.values.dtype
    b = _blocks(x, gate, 1, tiles_E, tile, max_tiles)
    group = group_columns(N)
    b = b if b.tn % group == 0 else b.with_columns(group)
    groups = b.tn // group
    outputs = (
        shape_like(x.values, (P, N), values_dtype),
        shape_like(x.values, (N // b.tn, P, groups), jnp.float32),
    )
    by_block = pl.BlockSpec((None, b.M, groups), lambda n, i, k, expert, tile, _: (n, tile[i], 0))
    finish = functools.partial(_store_hidden, group, activation)
    args = x, gate, up, finish, outputs, (b.y_spec, by_block), 1
    values, scales_nPG = _call(b, *args, dtype, interpret, "scaled_hidden")
    return Scaled(values, jnp.moveaxis(scales_nPG, 0, 1).reshape(P, N // group))


def scaled_products(
    x: Scaled,
    gate: Scaled,
    up: Scaled,
    tiles_E,
    tile: int,
    *,
    dtype,
    max_tiles: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Both products of `scaled_hidden`, gate_PN and up_PN, in `dtype`."""
    P, N = len(x.values), gate.values.shape[2]
    b = _blocks(x, gate, 2 * jnp.dtype(dtype).itemsize, tiles_E, tile, max_tiles)
    outputs = (shape_like(x.values, (P, N), dtype),) * 2
    args = x, gate, up, _store_products, outputs, (b.y_spec,) * 2, 0
    return _call(b, *args, dtype, interpret, "scaled_products")


def _blocks(
    x: Scaled, w: Scaled | QuantizedArray, results: int, tiles_E, tile, max_tiles
) -> Blocks:
    _, values, scales = kernel_operands(w)
    assert scales is not None
    (_, _, K, N), groups = values.shape, scales.shape[2]
    bits = jax.dtypes.itemsize_bits(values.dtype)
    column = 4 * 4 * max(8, groups)  # scales, two of each matrix at a time
    if bits < 8:
        column += 2 * (K // groups)  # as int8
    sums = (2 if groups == 1 else 4) * 4  # with those of a group
    size = KernelBytes(1, 2 * bits / 8, results, sums, 1, column, 2 * SCALE_BYTES)
    return make_blocks(x.values, N, size, tiles_E, tile, max_tiles).with_groups(groups)


def _call(b: Blocks, x, gate, up, finish, outputs, specs, transcendentals, dtype, interpret, name):
    (layer, *gates), (_, *ups) = kernel_operands(gate), kernel_operands(up)
    values, scales = zip(gates, ups, strict=True)
    prefetch = b.schedule.expert_I, b.schedule.tile_I, jnp.asarray(layer, jnp.int32).reshape(1)
    return pl.pallas_call(
        functools.partial(_kernel, b, finish, dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=b.grid,
            in_specs=[b.x_spec, b.scales_spec(1), *b.weight_specs(False, values, scales)],
            out_specs=specs,
            scratch_shapes=[pltpu.VMEM((b.M, b.tn), jnp.float32)] * 2,
        ),
        out_shape=outputs,
        compiler_params=b.compiler_params,
        cost_estimate=b.cost(2, transcendentals),
        interpret=interpret,
        name=name,
    )(*prefetch, *x, *values, *scales)


def _kernel(b: Blocks, finish: Callable, dtype, expert, tile, layer, *refs):
    """One block of K; `refs` are those of the operands, the results and the two sums."""
    x_ref, x_scale_ref, *w_refs, gate_scale_ref, up_scale_ref = refs[:6]
    *out_refs, gate_ref, up_ref = refs[6:]
    sums, k, step = (gate_ref, up_ref), pl.program_id(2), math.gcd(b.M, ROWS_PER_STORE)
    scale_refs = gate_scale_ref, up_scale_ref
    has_groups = gate_scale_ref.shape[0] > 1

    @pl.when(k == 0)
    def _():
        for sum_ref in sums:
            sum_ref[...] = jnp.zeros_like(sum_ref)

    for sum_ref, w_ref, scale_ref in zip(sums, w_refs, scale_refs, strict=True):
        if has_groups:
            sum_ref[...] += dot_integers(x_ref, w_ref, scale_ref, None, k * b.tk, b.K)
        else:
            sum_ref[...] += scaled_dot(x_ref[...], w_ref[...].astype(x_ref.dtype))

    def product(sum_ref, scale_ref, rows, columns):
        scaled = sum_ref[rows, columns] * x_scale_ref[rows, :]
        if not has_groups:
            scaled = scaled * scale_ref[:, columns].astype(jnp.float32)
        return scaled.astype(dtype)

    @pl.when(k == b.K // b.tk - 1)
    def _():
        @pl.loop(0, b.M, step=step)
        def _(row):
            rows = pl.ds(row, step)
            pairs = zip(sums, scale_refs, strict=True)
            finish(out_refs, rows, b.tn, [functools.partial(product, *p, rows) for p in pairs])


def _store_products(out_refs, rows, columns: int, products) -> None:
    for ref, product in zip(out_refs, products, strict=True):
        ref[rows, :] = product(slice(0, columns))


def _store_hidden(group: int, activation, out_refs, rows, columns: int, products) -> None:
    """One group of columns after the other, so that intermediates fit into registers."""
    values_ref, scales_ref = out_refs
    for g in range(columns // group):
        part = slice(g * group, (g + 1) * group)
        hidden = activation(*(product(part) for product in products))
        scaled = quantize(hidden, 1, values_ref.dtype)
        values_ref[rows, part] = scaled.values
        scales_ref[rows, g : g + 1] = scaled.scales
