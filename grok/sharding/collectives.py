"""`shard_map` by logical axes, and the collectives to use inside it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from grok.sharding.mesh import ambient_mesh
from grok.sharding.rules import Axes, mesh_axes, spec


def shard_map(
    f: Callable,
    in_axes: Sequence[Axes],
    out_axes: Axes | tuple[Axes, ...],
    *,
    check_vma: bool = True,
) -> Callable:
    """`f` run by each device on its own shards; plain `f` when there is no mesh.

    `in_axes` holds the logical axes of each argument, `out_axes` those of the result or results.
    With `check_vma` JAX checks that replicated results are equal on all devices; kernels that do
    not state it need it off.
    """
    if ambient_mesh() is None:
        return f

    def specs(axes: Any) -> Any:
        several = bool(axes) and isinstance(axes[0], tuple)
        return tuple(spec(*array_axes) for array_axes in axes) if several else spec(*axes)

    in_specs, out_specs = specs(tuple(in_axes)), specs(out_axes)
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)


def axis_names(axis: str | None) -> tuple[str, ...]:
    """Names of the mesh axes along `axis`, for collectives of JAX; none without a mesh."""
    return () if ambient_mesh() is None else mesh_axes(axis)


def split_axis_names(axis: str | None) -> tuple[str, ...]:
    """Those of more than one device; XLA would copy an array that it gathers from one alone."""
    return tuple(name for name in axis_names(axis) if ambient_mesh().shape[name] > 1)


def all_gather(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """The shards of `x` of all devices along `axis`, concatenated on dimension `dim`."""
    names = split_axis_names(axis)
    return jax.lax.all_gather(x, names, axis=dim, tiled=True) if names else x


def psum(x: jax.Array, axis: str) -> jax.Array:
    """The sum of `x` over the devices along `axis`."""
    return jax.lax.psum(x, axis_names(axis))


def pmax(x: jax.Array, axis: str | None) -> jax.Array:
    """The largest of `x` over the devices along `axis`, element by element."""
    names = split_axis_names(axis)
    return jax.lax.pmax(x, names) if names else x


def psum_scatter(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """The sum of `x` over the devices along `axis`, each with its shard of dimension `dim`."""
    names = split_axis_names(axis)
    return jax.lax.psum_scatter(x, names, scatter_dimension=dim, tiled=True) if names else x


def axis_index(axis: str) -> jax.Array | int:
    """The index of this device's shard along `axis`."""
    names = axis_names(axis)
    return jax.lax.axis_index(names) if names else 0
