"""Matrices stored in float32 and used in a smaller type, with gradients in that type."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowPrecisionGrad:
    """A matrix `w`, and `grad_slot`: zeros of its shape in the type of computation.

    The gradient is taken with respect to the slot, in its type; that of `w` would be the same
    numbers in float32, twice as large. Nothing reads the slot: a compiler removes it.
    """

    w: jax.Array
    grad_slot: jax.Array

    def astype(self, dtype) -> jax.Array:
        """The matrix in the type of computation."""
        assert dtype == self.grad_slot.dtype
        return _cast(self.w, self.grad_slot)


@jax.custom_vjp
def _cast(w, grad_slot):
    # Rounded first, which changes no bit: XLA would hoist a bare cast out of the loop over the
    # layers, barrier or not, and hold all layers in both types.
    info = jnp.finfo(grad_slot.dtype)
    return jax.lax.reduce_precision(w, info.nexp, info.nmant).astype(grad_slot.dtype)


_cast.defvjp(lambda w, grad_slot: (_cast(w, grad_slot), None), lambda _, gradient: (None, gradient))
