"""Matrices that stay among those of all layers, and products that read one where it lies.

A program that takes one matrix out of many copies it first, since what multiplies it wants an
array of its own: for a row or two that is most of the time. Read a few of its rows at a time, in
one loop with the multiplication, it comes from memory once and is written nowhere.

Letters: M rows, D contracted, F columns.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from grok.ops.weights.int8 import QuantizedArray

# Rows of the matrix that one turn of the loop adds: more would leave the nearest cache.
TURN = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackedArray:
    """A float matrix, or experts' matrices, of one `layer` of `values` (L, ..., rows, columns)."""

    values: Any
    layer: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what is the layer's."""
        return self.values.shape[1:]

    def __getitem__(self, index) -> jax.Array:
        """The matrix at `index` of the first of several leading axes."""
        return self.values[self.layer, index]

    def sliced(self) -> jax.Array:
        """The same as an array of its own."""
        return jax.lax.dynamic_index_in_dim(self.values, self.layer, keepdims=False)


@dataclasses.dataclass(frozen=True)
class InPlace:
    """One expert's matrix of a layer, to be read where it lies."""

    stack: StackedArray | QuantizedArray
    expert: Any


def product_in_place(x_MD: jax.Array, w_DF: InPlace) -> jax.Array:
    """x w, the weights rounded to the type of x, summed in float32 in order of D, y_MF float32.

    On CPU it has the memory's speed for a few rows; past eight, a copy and a plain product cost
    less. A row's bits do not depend on the other rows.
    """
    stack = w_DF.stack
    D, F = stack.shape[-2:]
    turn = math.gcd(D, TURN)

    def row(a, d):
        start = (stack.layer, w_DF.expert, d, jnp.zeros_like(d))
        return jax.lax.dynamic_slice(a, start, (1, 1, 1, F)).reshape(1, F).astype(jnp.float32)

    def weights(d):
        if isinstance(stack, QuantizedArray):
            w_1F = row(stack.values, d) * row(stack.scales, d // (D // stack.groups))
        else:
            w_1F = row(stack.values, d)
        return w_1F.astype(x_MD.dtype).astype(jnp.float32)

    def add(i, y_MF):
        for d in range(turn):
            at = i * turn + d
            x_M1 = jax.lax.dynamic_slice_in_dim(x_MD, at, 1, axis=1).astype(jnp.float32)
            y_MF += x_M1 * weights(at)
        return y_MF

    # From x, so that it is typed as different on every device, as the sum is.
    zeros_MF = jnp.zeros((len(x_MD), F), jnp.float32) + 0 * x_MD[:, :1].astype(jnp.float32)
    return jax.lax.fori_loop(0, D // turn, add, zeros_MF)
