"""Products with weights of any kind that are sharded over a mesh.

Letters: B batch, T length, and those of the weight's name.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
from flax import nnx

from grok import sharding
from grok.ops.cpu import few_rows
from grok.ops.weights.quantized import QuantizedArray
from grok.ops.weights.weight import Weight, adapter, base, cast, leaf_axes, materialize
from grok.sharding import Axes


@functools.singledispatch
def unshard(w: Weight, axes: Axes, dtype) -> jax.Array:
    """A matrix stored in `axes` as floats of `dtype`, gathered from the devices that share it."""
    return sharding.unshard(w.astype(dtype), *axes)


@unshard.register
def _(w: QuantizedArray, axes: Axes, dtype) -> jax.Array:
    # It travels as int8, and is multiplied by its scales where it arrives. It has no gradient.
    w = materialize(w)
    values_axes, scale_axes = (sharding.unsharded_axes(leaf) for leaf in leaf_axes(w, axes))
    values = sharding.constrain(w.values, *values_axes)
    scales = sharding.constrain(w.scales, *scale_axes)

    def local(values, scales):
        return dataclasses.replace(w, values=values, scales=scales).dequantize(dtype)

    return sharding.shard_map(local, (values_axes, scale_axes), values_axes)(values, scales)


def has_one_device() -> bool:
    """True where nothing is split over devices."""
    mesh = sharding.ambient_mesh()
    return mesh is None or mesh.size == 1


def few_rows_products(
    x: jax.Array, params: Sequence[nnx.Param], axes: Sequence[Axes], is_serving: bool
) -> list[jax.Array] | None:
    """Products of x (B, T, rows...) with matrices of one layer, (B, T, columns...) split as `axes`
    says, by one call of a kernel; None where that cannot be used."""
    weights = [cast(param.get_value(), x.dtype) for param in params]
    rows = math.prod(x.shape[:2])
    if not (is_serving and has_one_device() and few_rows.supports(rows, *weights)):
        return None

    def multiply(x, *weights):
        products = few_rows.multiply(x.reshape(rows, -1), *weights)
        pairs = zip(products, weights, strict=True)
        return [y.reshape(*x.shape[:2], *w.shape[x.ndim - 2 :]) for y, w in pairs]

    products = sharding.without_trivial_mesh(multiply)(x, *weights)
    return [sharding.constrain(y, *split) for y, split in zip(products, axes, strict=True)]


def product(
    subscripts: str,
    x: jax.Array,
    param: nnx.Param,
    w_axes: Axes,
    axes: Axes,
    is_serving: bool = False,
) -> jax.Array:
    """`einsum(subscripts, x, w)` of a matrix stored in `w_axes`, split as `axes` says; without
    gradients if `is_serving`.

    An adapter's product is computed beside it: x goes through the rank, never a whole matrix.
    """
    if products := few_rows_products(x, [param], [axes], is_serving):
        return products[0]
    w = materialize(cast(param.get_value(), x.dtype))
    factors = adapter(w)
    if factors is None:
        return sharding.einsum(subscripts, x, unshard(w, w_axes, x.dtype), axes=axes)
    inputs, out = subscripts.split("->")
    x_letters, w_letters = inputs.split(",")
    rows = "".join(letter for letter in w_letters if letter not in out)
    columns = w_letters.removeprefix(rows)
    lead = out.removesuffix(columns)
    w_base = unshard(base(w), w_axes, x.dtype)
    a = sharding.unshard(factors[0], *w_axes[: len(rows)], None)
    b = sharding.unshard(factors[1], None, *w_axes[len(rows) :])
    low = sharding.einsum(f"{x_letters},{rows}r->{lead}r", x, a, axes=(*axes[: len(lead)], None))
    added = sharding.einsum(f"{lead}r,r{columns}->{out}", low, b, axes=axes)
    return sharding.einsum(subscripts, x, w_base, axes=axes) + added
