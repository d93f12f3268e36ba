"""A layer's matrices among those of all layers, which a slice would copy."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from grok.ops.weights import weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerSlice:
    """A float matrix, or experts' matrices, of one `layer` of `values` (L, ..., rows, columns)."""

    values: Any
    layer: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the layer's matrices."""
        return self.values.shape[1:]

    def __getitem__(self, index) -> jax.Array:
        """The matrix at `index` of the first of several leading axes."""
        return self.values[self.layer, index]

    def read_row(self, expert, d) -> jax.Array:
        """Row `d` of an expert's matrix, (1, columns) float32."""
        return row_of(self.values, self.layer, expert, d)


def row_of(values_LEDF: jax.Array, layer, expert, d) -> jax.Array:
    """One row of one expert's matrix of one layer, (1, F) float32."""
    F = values_LEDF.shape[-1]
    start = (layer, expert, d, jnp.zeros_like(d))
    return jax.lax.dynamic_slice(values_LEDF, start, (1, 1, 1, F)).reshape(1, F).astype(jnp.float32)


@weight.cast.register
def _(w: LayerSlice, dtype):
    return w


@weight.materialize.register
def _(w: LayerSlice):
    return jax.lax.dynamic_index_in_dim(w.values, w.layer, keepdims=False)


@weight.is_stacked.register
def _(w: LayerSlice):
    return True


@weight.is_plain.register
def _(w: LayerSlice):
    return False


@weight.leaf_axes.register
def _(w: LayerSlice, axes):
    return (None, *axes), ()  # and the index of the layer


@weight.kernel_operands.register
def _(w: LayerSlice):
    return w.layer, w.values, None


@weight.take_expert.register
def _(w_EDF: LayerSlice, expert, dtype):
    return w_EDF[expert].astype(dtype)
