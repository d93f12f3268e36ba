"""Products with weights of any kind that are sharded over a mesh.

Letters: B batch, T length, and those of the weight's name.
"""

import dataclasses

import jax
from flax import nnx

from grok import sharding
from grok.ops.weights.int8 import QuantizedArray
from grok.ops.weights.lora import LoraArray
from grok.sharding import Axes


def matrix(param: nnx.Param, axes: Axes, dtype) -> jax.Array:
    """A matrix in the type of computation, collected from the devices that share it.

    `axes` are the logical axes it is kept in. An int8 matrix travels as int8 and is multiplied by
    its scales where it arrives; only a float one has a gradient.
    """
    w = param.get_value()
    if not isinstance(w, QuantizedArray):
        return sharding.unshard(w.astype(dtype), *axes)
    w = w.sliced()
    scale_axes = quantized_axes(w, axes)
    whole, whole_scales = sharding.unsharded_axes(axes), sharding.unsharded_axes(scale_axes)
    values, scales = (
        sharding.constrain(w.values, *whole),
        sharding.constrain(w.scales, *whole_scales),
    )

    def local(values, scales):
        return dataclasses.replace(w, values=values, scales=scales).dequantize(dtype)

    return sharding.shard_map(local, (whole, whole_scales), whole)(values, scales)


def product(subscripts: str, x: jax.Array, param: nnx.Param, w_axes: Axes, axes: Axes) -> jax.Array:
    """`einsum(subscripts, x, w)` of a matrix that is kept in `w_axes`, split as `axes` says.

    What an adapter adds is computed beside it: x goes through the rank, and never a whole matrix.
    """
    w = param.get_value()
    if not isinstance(w, LoraArray):
        return sharding.einsum(subscripts, x, matrix(param, w_axes, x.dtype), axes=axes)
    w = w.scaled(x.dtype)
    inputs, out = subscripts.split("->")
    x_letters, w_letters = inputs.split(",")
    rows = "".join(letter for letter in w_letters if letter not in out)
    columns = w_letters.removeprefix(rows)
    kept = out.removesuffix(columns)
    base, a, b = (
        sharding.unshard(w.base, *w_axes),
        sharding.unshard(w.a, *w_axes[: len(rows)], None),
        sharding.unshard(w.b, None, *w_axes[len(rows) :]),
    )
    low = sharding.einsum(f"{x_letters},{rows}r->{kept}r", x, a, axes=(*axes[: len(kept)], None))
    added = sharding.einsum(f"{kept}r,r{columns}->{out}", low, b, axes=axes)
    return sharding.einsum(subscripts, x, base, axes=axes) + added


def quantized_axes(w: QuantizedArray, axes: Axes) -> Axes:
    """Logical axes of the scales of a matrix with these axes.

    Several groups of rows are split like the rows; a single one is on every device.
    """
    columns = len(axes) - w.output_dims
    rows = columns - w.contract_dims
    return (*axes[:rows], None if w.num_scale_groups == 1 else axes[rows], *axes[columns:])
