"""The routed experts in 8 bits, forward and backward: products of values with scales that are made
as they are multiplied. On TPU by kernels, elsewhere the same mathematics in plain XLA.

Each product has scales along what it sums over: rows of x and of gradients have one, rows of the
hidden layer and of its gradients one for each group of columns, columns of matrices one over the
rows of all devices, and the operands of a matrix's gradient one for each column and tile of rows.
Sums, the activation, the weights and the gradients that result are in high precision.

Letters: R rows (tokens), C chosen experts of a row, D embed, F mlp, E experts, P slots.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from grok import hardware
from grok.ops.mlp import gated_activation
from grok.ops.moe import scaled_gradients, scaled_hidden, scaled_matmul
from grok.ops.moe.experts_pallas import combine, dispatch, group, mlp_part, weights_of_slots
from grok.ops.moe.tiling import MlpSplits
from grok.ops.scaled import FORMATS, Scaled, quantize

Shards = tuple[jax.Array, jax.Array, jax.Array]


class ScaledRows(NamedTuple):
    """Rows in 8 bits, values (R, D) and scales (R, 1), and `grad_slot`: zeros (R, D) in the type of
    computation, which receive the rows' gradient and which nothing reads."""

    values: Any  # of gradients None, as are scales
    scales: Any
    grad_slot: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def quantize_rows(x: jax.Array, matmul_dtype: str) -> ScaledRows:
    """Rows, the last axis, in 8 bits; the gradient is that of the grad slot."""
    scaled = quantize(x, x.ndim - 1, FORMATS[matmul_dtype].values)
    return ScaledRows(*scaled, jnp.zeros_like(x))


def _quantize_rows(x, matmul_dtype):
    return quantize_rows(x, matmul_dtype), None


quantize_rows.defvjp(_quantize_rows, lambda dtype, _, dx: (dx.grad_slot,))


class Unshard(Protocol):
    """Makes the matrices gate, up and down from a device's shards of them."""

    def __call__(self, shards: Shards) -> list[jax.Array]:
        """The matrices as they are, to be differentiated."""

    def quantized(self, shards: Shards, dims: tuple[int, int, int], dtype) -> list[Scaled]:
        """The matrices in 8 bits, with scales along these dimensions, (E, N) of those that are
        left, over all shards."""


class Options(NamedTuple):
    """Options of the experts' products."""

    matmul_dtype: str
    splits: MlpSplits
    activation: str
    # The down matrix, gathered along its columns, has them major in memory.
    down_is_column_major: bool = False
    interpret: Any = None  # as of `pallas_call`; None: kernels on TPU alone


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def experts_scaled(
    x: ScaledRows,
    topk_weights_RC,
    expert_ids_RC,
    shards: Shards,
    unshard: Unshard,
    options: Options,
) -> jax.Array:
    """Sum over each row's experts of weight * expert(row), y_RD in the type of computation, of
    matrices of `shards`.

    `expert_ids_RC` int32 in [0, E), different within a row; `topk_weights_RC` float32. Gradients go
    to the grad slot of x, the weights and the shards. One of `options.splits` parts of the width is
    after the other, and the backward pass computes the hidden layer again.
    """
    return _forward(x, topk_weights_RC, expert_ids_RC, shards, unshard, options)[0]


def _forward(x, topk_weights_RC, expert_ids_RC, shards, unshard, options):
    run = _Products(expert_ids_RC, shards[0].shape[0], x.grad_slot.dtype, options)
    rows, y_PD = run.dispatch(x), None
    for part in range(options.splits.forward):
        matrices = unshard.quantized(
            mlp_part(shards, part, options.splits.forward), (1, 1, 1), run.formats.values
        )
        hidden = run.hidden(rows, *matrices[:2])
        y_PD = run.down(hidden, matrices[2], False, y_PD)
        if part < options.splits.forward - 1:  # Several parts at once would need their memory.
            rows, y_PD = jax.lax.optimization_barrier((rows, y_PD))
    y_RD = combine(y_PD, run.layout, topk_weights_RC).astype(run.dtype)
    return y_RD, (Scaled(x.values, x.scales), topk_weights_RC, expert_ids_RC, shards)


def _backward(unshard, options, residuals, dy_RD):
    x, topk_weights_RC, expert_ids_RC, shards = residuals
    run = _Products(expert_ids_RC, shards[0].shape[0], dy_RD.dtype, options)
    dy = run.dispatch(quantize(dy_RD, 1, run.formats.gradients))
    weight_P = weights_of_slots(topk_weights_RC, run.layout)
    rows, dx_PD, dweight_P, dshards = None, None, jnp.zeros_like(weight_P), None
    splits = options.splits.backward
    for part in range(splits):
        take_part: Callable = functools.partial(mlp_part, part=part, splits=splits)
        # What the down matrix multiplies here is summed over its columns.
        gate, up, down = unshard.quantized(take_part(shards), (1, 1, 2), run.formats.values)
        _, pull = jax.vjp(lambda shards, take=take_part: unshard(take(shards)), shards)
        dhidden_PF = run.down(dy, down, True)
        if rows is None:  # Rows of x may still be on their way while those of dy are multiplied.
            x, dhidden_PF = jax.lax.optimization_barrier((x, dhidden_PF))
            rows = run.dispatch(x)
        products = run.products(rows, gate, up)
        factors = scaled_gradients.RowFactors(weight_P[:, None], rows.scales, dy.scales)
        grads = run.hidden_gradients(products, dhidden_PF, factors, (gate.scales, up.scales))
        dweight_P += grads.weights_P1[:, 0]
        dx_PD = run.row_gradients(grads, gate, up, dx_PD)
        if part == splits - 1:  # Gradients of rows travel while those of matrices are made.
            dx_RD = combine(dx_PD, run.layout, jnp.ones_like(topk_weights_RC)).astype(run.dtype)
            dx_RD, grads = jax.lax.optimization_barrier((dx_RD, grads))
        multiplied_by = rows, rows, dy
        *dw, dw_down = (
            run.weight_gradient(x.values, columns, shard.dtype)
            for x, columns, shard in zip(multiplied_by, grads.by_columns, shards, strict=True)
        )
        (added,) = pull([*dw, jnp.swapaxes(dw_down, 1, 2)])
        dshards = added if dshards is None else jax.tree.map(jnp.add, dshards, added)
        if part < splits - 1:  # Several parts at once would need their memory.
            rows, dx_PD = jax.lax.optimization_barrier((rows, dx_PD))
    return ScaledRows(None, None, dx_RD), dweight_P[run.layout.slot_RC], None, dshards


experts_scaled.defvjp(_forward, _backward)


class _Products:
    """Products of rows grouped by expert, on TPU by kernels, elsewhere in plain XLA."""

    def __init__(self, expert_ids_RC, num_experts: int, dtype, options: Options):
        self.dtype, self.formats = dtype, FORMATS[options.matmul_dtype]
        self._column_major = options.down_is_column_major
        self._activation = functools.partial(gated_activation, activation=options.activation)
        interpret = options.interpret
        self._is_kernel = interpret is not None or hardware.platform() == "tpu"
        self.layout, args = group(expert_ids_RC, num_experts, interpret or False)
        tiles = {"tiles_E": args["tiles_E"], "tile": args["tile"]}
        self._args = args if self._is_kernel else tiles

    def _run(self, module, name: str, *arrays, **options) -> Any:
        run = getattr(module, name if self._is_kernel else f"{name}_xla")
        return run(*arrays, **self._args, **options)

    def dispatch(self, x: Scaled | ScaledRows) -> Scaled:
        """Each assignment's row in its slot."""
        return Scaled(dispatch(x.values, self.layout), dispatch(x.scales, self.layout))

    def hidden(self, x: Scaled, gate: Scaled, up: Scaled) -> Scaled:
        """The hidden layer, in 8 bits."""
        options = {"dtype": self.dtype, "activation": self._activation}
        with jax.named_scope("hidden"):
            return self._run(scaled_hidden, "scaled_hidden", x, gate, up, **options)

    def products(self, x: Scaled, gate: Scaled, up: Scaled) -> tuple[jax.Array, jax.Array]:
        """gate_PF and up_PF."""
        with jax.named_scope("hidden"):
            return self._run(scaled_hidden, "scaled_products", x, gate, up, dtype=self.dtype)

    @jax.named_scope("down")
    def down(self, rows: Scaled, w_down: Scaled, transposed: bool, start=None) -> jax.Array:
        """Rows times the down matrix of their expert, `transposed` or not, added to `start`."""
        if self._column_major:
            w_down = Scaled(jnp.swapaxes(w_down.values, 1, 2), w_down.scales)
            transposed = not transposed
        return self._matmul((rows,), (w_down,), transposed, start)

    def _matmul(self, xs, ws, transposed: bool, start) -> jax.Array:
        options = {"dtype": self.dtype, "transposed": transposed, "start": start}
        return self._run(scaled_matmul, "scaled_matmul", xs, ws, **options)

    @jax.named_scope("hidden_gradients")
    def hidden_gradients(self, products, dhidden_PF, factors, scales_EF):
        """Operands of the products that make the gradients of rows and matrices."""
        arrays = products, dhidden_PF, factors, scales_EF
        options = {"formats": self.formats, "activation": self._activation}
        return self._run(scaled_gradients, "hidden_gradients", *arrays, **options)

    @jax.named_scope("row_gradients")
    def row_gradients(self, grads, gate: Scaled, up: Scaled, start) -> jax.Array:
        """Gradients of rows, added to `start`; the scales of the matrices are in `grads`."""
        ws = Scaled(gate.values, None), Scaled(up.values, None)
        return self._matmul(grads.by_rows, ws, True, start)

    @jax.named_scope("weight_gradients")
    def weight_gradient(self, x_PK, dy: Scaled, dtype) -> jax.Array:
        """Gradient of a matrix, its columns those of dy."""
        return self._run(scaled_gradients, "scaled_weight_gradient", x_PK, dy, dtype=dtype)
