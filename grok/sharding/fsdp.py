"""Fully sharded weights (ZeRO-3, Rajbhandari et al. 2020): unsharded for use, whole for Muon."""

import math
from collections.abc import Callable

import jax
from jax.experimental.layout import Layout, with_layout_constraint

from grok import hardware
from grok.sharding.collectives import split_axis_names
from grok.sharding.mesh import ambient_mesh
from grok.sharding.rules import BATCH_AXES, RULES, Axes, mesh_axes, partition_spec, unsharded_axes


def unshard(w: jax.Array, *axes: str | None) -> jax.Array:
    """A weight with logical `axes`, all-gathered to `unsharded_axes`.

    Its gradient arrives as a sum still to be made over the chips that see other tokens, so the
    transposed moves are reduce-scatters. One mesh axis at a time: for several at once XLA sums
    arrays that are zero elsewhere, at twice the bytes.
    """
    if ambient_mesh() is None:
        return w
    for first in range(len(BATCH_AXES) - 1, -1, -1):
        gathered = BATCH_AXES[first:]
        axes_of_dims = [_remaining(axis, gathered) for axis in axes]
        w = jax.sharding.reshard(w, partition_spec(axes_of_dims, reduced=frozenset(gathered)))
    return w


def _remaining(axis: str | None, gathered: tuple[str, ...]) -> tuple[str, ...]:
    """Mesh axes of a weight's axis that are left when these are gathered."""
    if axis is None:
        return ()
    used = mesh_axes(RULES[axis].unsharded)
    return tuple(name for name in mesh_axes(axis) if name in used or name not in gathered)


def unshard_local(w: jax.Array, axes: Axes) -> jax.Array:
    """As `unshard`, of this device's shard, inside `shard_map`."""
    for name in reversed(BATCH_AXES):
        for dim, (axis, unsharded) in enumerate(zip(axes, unsharded_axes(axes), strict=True)):
            if name in split_axis_names(axis) and name not in mesh_axes(unsharded):
                if dim == w.ndim - 1:
                    w = _pin_stored_layout(w)
                w = jax.lax.all_gather(w, name, axis=dim, tiled=True)
    return w


def pin_row_major(x: jax.Array) -> jax.Array:
    """`x`, and its gradient, with the last axis in a TPU's lanes. The next operation might prefer
    another layout, and XLA would apply it to the gathered tokens of a group, not one device's."""
    if hardware.platform() != "tpu":
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


@jax.custom_vjp
def _pin_stored_layout(w: jax.Array) -> jax.Array:
    """A shard of a weight that is to be gathered along its last axis, in its stored layout.

    The gathered array has that axis major; unless the layout of its shard is pinned, XLA transposes
    the shards of all layers before the loop over them. The gradient may have any layout.
    """
    return pin_row_major(w)


_pin_stored_layout.defvjp(lambda w: (pin_row_major(w), None), lambda _, dw: (dw,))


def map_matrices(f: Callable, x: jax.Array, num_leading: int) -> jax.Array:
    """`f(x)`, of x's shape, where f maps each matrix at the first `num_leading` axes by itself.

    The matrices are spread over as many of the devices that share x as divide their numbers; each
    device runs `f` on its own, and the result returns to the sharding of x. Other devices repeat
    the work.
    """
    mesh = ambient_mesh()
    if mesh is None:
        return f(x)
    stored = jax.typeof(x).sharding.spec
    axes_of_dims = [((names,) if isinstance(names, str) else names or ()) for names in stored]
    leading = axes_of_dims[:num_leading]
    for axis in (name for names in axes_of_dims[num_leading:] for name in names):
        for dim in range(num_leading):
            devices = math.prod(mesh.shape[name] for name in (*leading[dim], axis))
            if x.shape[dim] % devices == 0:
                leading[dim] = (*leading[dim], axis)
                break
    whole = partition_spec([*leading, *[()] * (x.ndim - num_leading)])
    sharded_f = jax.shard_map(f, in_specs=whole, out_specs=whole)
    return jax.sharding.reshard(sharded_f(jax.sharding.reshard(x, whole)), stored)
