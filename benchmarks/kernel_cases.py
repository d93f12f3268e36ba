"""The kernels of the experts, each alone, with abstract arguments: what `kernel_sweep` compiles.

Letters: D embed, F width, R rows, E experts, P slots, K contracted axis, N columns, I tiles.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grok.hardware import CHIPS
from grok.ops.mlp import gated_activation
from grok.ops.moe.grouped_hidden import grouped_hidden
from grok.ops.moe.grouped_matmul import grouped_matmul, grouped_weight_gradient
from grok.ops.moe.scaled_gradients import RowFactors, hidden_gradients, scaled_weight_gradient
from grok.ops.moe.scaled_hidden import scaled_hidden, scaled_products
from grok.ops.moe.scaled_matmul import scaled_matmul
from grok.ops.moe.tiling import kernel_tile_rows
from grok.ops.scaled import FORMATS, MatmulFormat, Scaled, group_columns
from grok.ops.weights.quantized import QuantizedArray

EXPERTS, CHOSEN = 8, 2
INT8_GROUPS, INT4_GROUP_ROWS = 8, 128  # groups of rows with a scale, and rows of one
Kernels = dict[str, tuple[Callable, tuple]]


class Case(NamedTuple):
    """A chip and the shape of its experts."""

    chip: str
    embed: int
    width: int
    rows: int


def kernels(case: Case, trains: bool) -> Kernels:
    """Functions of one kernel each, with abstract arguments: those of serving, and where the case
    `trains`, of training."""
    shapes = Shapes(case)
    cases = shapes.serving()
    if "int8" in CHIPS[case.chip].flops_8bit:
        cases |= shapes.serving_in_int8()
    if trains:
        cases |= shapes.training()
        if types := CHIPS[case.chip].flops_8bit:
            cases |= shapes.training_in_8_bits(next(iter(types)))
    return cases


class Shapes:
    """Abstract arrays of a case."""

    def __init__(self, case: Case):
        D, F, R, E = case.embed, case.width, case.rows, EXPERTS
        self.D, self.F, self.E, self.M = D, F, E, kernel_tile_rows(R, CHOSEN, E)
        self.P = min(R * CHOSEN // self.M + E, E * -(-R // self.M)) * self.M
        self.groups = F // group_columns(F)
        self.tiles_E = jax.ShapeDtypeStruct((E,), jnp.int32)
        self.args: dict[str, Any] = {"tile": self.M, "max_tiles": R * CHOSEN}

    def rows(self, N: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        """Rows of all slots."""
        return jax.ShapeDtypeStruct((self.P, N), dtype)

    def matrix(self, K: int, N: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        """A matrix of each expert."""
        return jax.ShapeDtypeStruct((self.E, K, N), dtype)

    def scaled_rows(self, N: int, dtype: Any, groups: int = 1) -> Scaled:
        """Rows in 8 bits."""
        return Scaled(self.rows(N, dtype), self.rows(groups, jnp.float32))

    def scaled_matrix(self, K: int, N: int, dtype: Any) -> Scaled:
        """A matrix of each expert in 8 bits, with a scale for each column."""
        scales = jax.ShapeDtypeStruct((self.E, N), jnp.float32)
        return Scaled(self.matrix(K, N, dtype), scales)

    def quantized(self, K: int, N: int, dtype: Any) -> QuantizedArray:
        """A matrix of each expert in int8 or int4."""
        groups = INT8_GROUPS if dtype == jnp.int8 else K // INT4_GROUP_ROWS
        scales = jnp.float32 if dtype == jnp.int8 else jnp.bfloat16
        return QuantizedArray(self.matrix(K, N, dtype), self.matrix(groups, N, scales))

    def serving(self) -> Kernels:
        """Rows in bfloat16."""

        def multiply(x, w, tiles_E):
            return grouped_matmul((x,), (w,), tiles_E, dtype=jnp.bfloat16, **self.args)

        D, F, tiles_E = self.D, self.F, self.tiles_E
        x_PD, x_PF, up_EDF = self.rows(D), self.rows(F), self.matrix(D, F)
        cases: Kernels = {
            "hidden": (self._hidden(False), (x_PD, up_EDF, up_EDF, tiles_E)),
            "down": (multiply, (x_PF, self.matrix(F, D), tiles_E)),
        }
        for dtype in (jnp.int8, jnp.int4):
            name = jnp.dtype(dtype).name
            cases[f"{name} gate"] = multiply, (x_PD, self.quantized(D, F, dtype), tiles_E)
            cases[f"{name} down"] = multiply, (x_PF, self.quantized(F, D, dtype), tiles_E)
        return cases

    def serving_in_int8(self) -> Kernels:
        """Rows in int8."""

        def hidden(x, w, tiles_E):
            options = {"dtype": jnp.bfloat16, "activation": gated_activation} | self.args
            return scaled_hidden(x, w, w, tiles_E, **options)

        def down(x, w, tiles_E):
            options = {"dtype": jnp.bfloat16, "row_scales": x.scales} | self.args
            return grouped_matmul((x.values,), (w,), tiles_E, **options)

        D, F, cases = self.D, self.F, dict[str, tuple[Callable, tuple]]()
        x_PD = self.scaled_rows(D, jnp.int8)
        x_PF = self.scaled_rows(F, jnp.int8, self.groups)
        for name, dtype in (("W8A8", jnp.int8), ("W4A8", jnp.int4)):
            cases[f"{name} hidden"] = hidden, (x_PD, self.quantized(D, F, dtype), self.tiles_E)
            cases[f"{name} down"] = down, (x_PF, self.quantized(F, D, dtype), self.tiles_E)
        return cases

    def training(self) -> Kernels:
        """Forward and backward in bfloat16, but for what serving has."""

        def matmul(pairs: int, start: bool = False) -> Callable:
            def run(tiles_E, *arrays):
                xs, ws, starts = arrays[:pairs], arrays[pairs : 2 * pairs], arrays[2 * pairs :]
                options = {"transposed": True, "start": starts[0] if start else None}
                return grouped_matmul(xs, ws, tiles_E, dtype=jnp.bfloat16, **options, **self.args)

            return run

        def gradient(x, dy, tiles_E):
            return grouped_weight_gradient(x, dy, tiles_E, self.M, dtype=jnp.bfloat16)

        D, F, tiles_E = self.D, self.F, self.tiles_E
        x_PD, x_PF, up_EDF = self.rows(D), self.rows(F), self.matrix(D, F)
        pairs = tiles_E, x_PF, x_PF, up_EDF, up_EDF
        return {
            "hidden and products": (self._hidden(True), (x_PD, up_EDF, up_EDF, tiles_E)),
            "dhidden": (matmul(1), (tiles_E, x_PD, self.matrix(F, D))),
            "dx": (matmul(2), pairs),
            "dx of a half": (matmul(2, True), (*pairs, x_PD)),
            "dw": (gradient, (x_PD, x_PF, tiles_E)),
        }

    def training_in_8_bits(self, matmul_dtype: str) -> Kernels:
        """Forward and backward in 8 bits."""
        formats = FORMATS[matmul_dtype]
        return self._forward_in_8_bits(formats.values) | self._backward_in_8_bits(formats)

    def _forward_in_8_bits(self, dtype: Any) -> Kernels:
        def hidden(kernel: Callable, **options: Any) -> Callable:
            options |= {"dtype": jnp.bfloat16} | self.args
            return lambda x, gate, up, tiles_E: kernel(x, gate, up, tiles_E, **options)

        D, F = self.D, self.F
        up = self.scaled_matrix(D, F, dtype)
        products = self.scaled_rows(D, dtype), up, up, self.tiles_E
        x_PF, down = self.scaled_rows(F, dtype, self.groups), self.scaled_matrix(F, D, dtype)
        return {
            "scaled hidden": (hidden(scaled_hidden, activation=gated_activation), products),
            "scaled products": (hidden(scaled_products), products),
            "scaled down": (self._scaled(False), (self.tiles_E, None, x_PF, down)),
        }

    def _backward_in_8_bits(self, formats: MatmulFormat) -> Kernels:
        def gradients(tiles_E, x_PF, scale_EF):
            factors = RowFactors(*[x_PF[:, :1].astype(jnp.float32)] * 3)
            options = {"formats": formats, "activation": gated_activation} | self.args
            columns = scale_EF, scale_EF
            return hidden_gradients((x_PF, x_PF), x_PF, factors, columns, tiles_E, **options)

        def gradient(x_PD, dy, tiles_E):
            return scaled_weight_gradient(x_PD, dy, tiles_E, dtype=jnp.bfloat16, **self.args)

        (D, F), tiles_E = (self.D, self.F), self.tiles_E
        dy_PD = self.scaled_rows(D, formats.gradients)
        up, down = (self.scaled_matrix(*sides, formats.values) for sides in ((D, F), (F, D)))
        dup_PF = self.scaled_rows(F, formats.gradients, self.groups)
        scale_I1F = jax.ShapeDtypeStruct((self.P // self.M, 1, F), jnp.float32)
        by_rows = Scaled(down.values, up.scales)  # for what the down matrix is summed over
        x_PD, by_columns = self.rows(D, formats.values), Scaled(dup_PF.values, scale_I1F)
        return {
            "scaled dhidden": (self._scaled(True), (tiles_E, None, dy_PD, by_rows)),
            "scaled dx of a half": (self._scaled(True, 2), (tiles_E, self.rows(D), dup_PF, up)),
            "scaled gradients": (gradients, (tiles_E, self.rows(F), up.scales)),
            "scaled dw": (gradient, (x_PD, by_columns, tiles_E)),
        }

    def _scaled(self, transposed: bool, pairs: int = 1) -> Callable:
        options = {"dtype": jnp.bfloat16, "transposed": transposed} | self.args

        def run(tiles_E, start, x, w):
            ws = (w,) if pairs == 1 else (Scaled(w.values, None),) * pairs
            return scaled_matmul((x,) * pairs, ws, tiles_E, start=start, **options)

        return run

    def _hidden(self, keep_products: bool) -> Callable:
        options = {"activation": gated_activation, "keep_products": keep_products} | self.args
        return lambda x, gate, up, tiles_E: grouped_hidden(x, gate, up, tiles_E, **options)
