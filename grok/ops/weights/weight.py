"""Operations of every kind of weight, as generic functions.

A plain array has the default form of each; int8, LoRA, a layer of a stack and a gradient slot
register theirs in their own files. A new kind of weight is a dataclass that registers what differs.

Letters: R rows, D contracted, F columns, E experts.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

# jax.Array, QuantizedArray, LoraArray, FrozenArray, LayerSlice, LowPrecisionGrad or ExpertSlice
Weight = Any
LogicalAxes = tuple[str | None, ...]


@functools.singledispatch
def cast(w: Weight, dtype) -> Weight:
    """The weight in the type of computation; int8 and stacked weights are cast an expert at a
    time."""
    return w.astype(dtype)


@functools.singledispatch
def take_layer(w: Weight, layer: jax.Array) -> Weight:
    """One layer of a weight that has the layers stacked in front."""
    return jax.lax.dynamic_index_in_dim(w, layer, keepdims=False)


@functools.singledispatch
def materialize(w: Weight) -> Weight:
    """The weight without the other layers, where it is a layer of a stack."""
    return w


@functools.singledispatch
def is_stacked(w: Weight) -> bool:
    """True where the weight is a layer of a stack."""
    return False


@functools.singledispatch
def leaf_axes(w: Weight, axes: LogicalAxes) -> tuple[LogicalAxes, ...]:
    """Logical axes of each array of a weight whose matrix has `axes`."""
    return (axes,)


@functools.singledispatch
def take_expert(w_EDF: Weight, expert: Any, dtype) -> Weight:
    """One expert's matrix, in `dtype`."""
    return w_EDF[expert]


def as_one_expert(w_DF: Weight) -> Weight:
    """A matrix as those of a mixture of one expert, w_EDF with E = 1."""
    axis = int(is_stacked(w_DF))
    return jax.tree.map(lambda leaf: jnp.expand_dims(leaf, axis) if leaf.ndim else leaf, w_DF)


@functools.singledispatch
def base(w: Weight) -> Weight:
    """The weight without its adapter."""
    return w


@functools.singledispatch
def adapter(w: Weight) -> tuple[jax.Array, jax.Array] | None:
    """The factors a and b of the weight's adapter; None without one."""
    return None


@functools.singledispatch
def is_plain(w: Weight) -> bool:
    """True of a plain array."""
    return True


@functools.singledispatch
def as_trained(w: Weight) -> Weight:
    """The weight as a training step multiplies it: with floats in place of a frozen quantised
    matrix. Those that serve, without adapters, stay."""
    return w


@functools.singledispatch
def kernel_operands(w_EDF: Weight) -> tuple[Any, jax.Array, jax.Array | None]:
    """The layer's index, and values and scales of all layers, (L, E, ...): a slice would be copied
    before a kernel reads it."""
    return 0, w_EDF[None], None


@functools.singledispatch
def matmul(w_DF: Weight, x_RD: jax.Array) -> jax.Array:
    """x w, summed in float32."""
    return dot(x_RD, w_DF)


@functools.singledispatch
def matmul_transposed(w_DF: Weight, y_RF: jax.Array) -> jax.Array:
    """y w^T, summed in float32."""
    return dot(y_RF, w_DF.T)


@functools.singledispatch
def weight_gradient(w_DF: Weight, x_RD: jax.Array, dy_RF: jax.Array) -> Weight:
    """Gradient of <dy, x w> in float32, as `w` in structure."""
    return dot(x_RD.T, dy_RF)


@functools.singledispatch
def trainable_part(w: Weight) -> Weight:
    """The part of a weight that has a gradient, as `weight_gradient` returns it."""
    return w


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b, summed in float32."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
