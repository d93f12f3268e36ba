"""The table from logical axes to mesh axes, and arrays that are sharded by it."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from grok.config.model import QUANTIZED_DTYPES
from grok.sharding.mesh import ambient_mesh

Axes = tuple[str | None, ...]  # logical axes of an array; None is replicated

BATCH_AXES = ("slice", "data", "expert")


class AxisRule(NamedTuple):
    """A logical axis: the mesh axes that it is sharded over, and the logical axis that a weight has
    in its place after `unshard` (None: whole on every device)."""

    mesh_axes: tuple[str, ...]
    unsharded: str | None


# Weights are sharded over every chip that sees other tokens (ZeRO-3) and unsharded before use:
# the `fsdp_*` axes. Each device has a slice of every expert, since `mlp` is sharded over the expert
# axis too: the devices of an `expert_group` share their tokens, and however tokens are routed,
# their work is even.
#
# A TPU stores an array's last axis in lanes of 128 and pads it to a multiple, so axes that come
# earlier take part of the sharding where they can.
RULES = {
    # Axis: over these mesh axes, unsharded as this axis.
    "batch": AxisRule(BATCH_AXES, "batch"),
    "length": AxisRule((), "length"),
    "sp_length": AxisRule(("tensor",), "sp_length"),
    "layers": AxisRule((), "layers"),
    "vocab": AxisRule(("tensor",), "vocab"),
    "fsdp_vocab": AxisRule(("tensor", "data", "expert"), "vocab"),
    "embed": AxisRule((), None),
    "fsdp_embed": AxisRule(("data",), None),
    "fsdp_embed_only": AxisRule(("data", "expert"), None),
    "heads": AxisRule(("tensor",), "heads"),
    "fsdp_heads": AxisRule(("tensor", "expert"), "heads"),
    "kv_heads": AxisRule(("tensor",), "kv_heads"),
    "fsdp_kv_heads": AxisRule(("tensor", "expert"), "kv_heads"),
    "head_dim": AxisRule((), None),
    "experts": AxisRule((), "experts"),
    "expert_group": AxisRule(("expert",), "expert_group"),
    "mlp": AxisRule(("expert", "tensor"), "mlp"),
    "mlp_within_group": AxisRule(("tensor",), "mlp_within_group"),
}


def mesh_axes(axis: str | None) -> tuple[str, ...]:
    """Mesh axes that a logical axis is sharded over."""
    return () if axis is None else RULES[axis].mesh_axes


def unsharded_axes(axes: Axes) -> Axes:
    """Logical axes of a weight after `unshard`."""
    return tuple(None if axis is None else RULES[axis].unsharded for axis in axes)


def partition_spec(axes_of_dims: list[tuple[str, ...]], **options) -> PartitionSpec:
    """The PartitionSpec of these mesh axes for each dimension."""
    return PartitionSpec(*(axes or None for axes in axes_of_dims), **options)


def spec(*axes: str | None) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes.

    Raises ValueError when two of them are sharded over the same mesh axis.
    """
    axes_of_dims = [mesh_axes(axis) for axis in axes]
    used = [name for names in axes_of_dims for name in names]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} are split twice over one of the mesh axes {used}")
    return partition_spec(axes_of_dims)


def axis_size(axis: str) -> int:
    """Number of shards of a logical axis on the ambient mesh."""
    mesh = ambient_mesh()
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in mesh_axes(axis))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` sharded by its logical axes."""
    return x if ambient_mesh() is None else jax.sharding.reshard(x, spec(*axes))


def einsum(subscripts: str, *operands: jax.Array, axes: Axes, **options) -> jax.Array:
    """`jnp.einsum` with its result sharded by `axes`; sums over sharded axes are all-reduced."""
    if ambient_mesh() is not None:
        options["out_sharding"] = spec(*axes)
    return jnp.einsum(subscripts, *operands, **options)


def sequence_parallel_axes(length: int) -> Axes:
    """Axes of the residual stream of rows of this length: between blocks the devices that share
    heads and experts each hold some of the tokens (Korthikanti et al. 2022), if these divide."""
    return "batch", None if length % axis_size("sp_length") else "sp_length", None


def kv_axis(num_kv_heads: int) -> str | None:
    """Logical axis of kv heads: None (every device has them all) when they are too few to shard."""
    return None if num_kv_heads % axis_size("kv_heads") else "kv_heads"


def storage_axes(axes: Axes, shape: tuple[int, ...], param_dtype: str) -> Axes:
    """Axes that a weight with these logical axes is stored in, of a model in `param_dtype`.

    The devices that see other tokens, along data and expert, share it: by vocabulary or heads if
    these divide, else by the width of the model. Weights with neither vocabulary, heads nor the
    width of an MLP are small, and replicated. A quantised model only serves, and every
    token would unshard vocabulary and heads again, so there few devices share them.
    """
    if "mlp" in axes:
        return _renamed(axes, {"embed": "fsdp_embed"})
    shared = next((axis for axis in ("vocab", "heads", "kv_heads") if axis in axes), None)
    if shared is None:
        return (None,) * len(axes)
    size = shape[axes.index(shared)]
    used = kv_axis(size) if shared == "kv_heads" else shared
    if param_dtype in QUANTIZED_DTYPES:
        return _renamed(axes, {"embed": "fsdp_embed", shared: used})
    if used is None or size % axis_size(f"fsdp_{shared}"):
        return _renamed(axes, {"embed": "fsdp_embed_only", shared: used})
    # The vocabulary takes the whole of the sharding; heads leave the width its part of it.
    embed = None if shared == "vocab" else "fsdp_embed"
    return _renamed(axes, {"embed": embed, shared: f"fsdp_{shared}"})


def _renamed(axes: Axes, names: dict[str, str | None]) -> Axes:
    return tuple(axis if axis is None else names.get(axis, axis) for axis in axes)
