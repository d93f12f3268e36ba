"""A layer's matrices among those of all layers, which a slice would copy."""

import dataclasses
from typing import Any

import jax


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

    def sliced(self) -> jax.Array:
        """The layer's matrices as an array of their own."""
        return jax.lax.dynamic_index_in_dim(self.values, self.layer, keepdims=False)
