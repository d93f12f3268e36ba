"""Where arrays live: the mesh, the rules from logical to mesh axes, and the moves between them.

The rest of the code names logical axes ("embed", "heads", ...); only this file knows that a mesh
has the axes slice, data, expert and tensor. Meshes are of JAX's explicit kind: an array's type
says how it is split, and an operation that would have to guess is an error while tracing.

Without a mesh every function here leaves arrays as they are, so the same model code runs on one
device. The ambient mesh is the one of `jax.set_mesh`, or the one the parameters live on.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from grok.config import MESH_AXES, MeshConfig, resolve_mesh
from grok.errors import ConfigError

BATCH_AXES = ("slice", "data", "expert")

Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """Mesh axes that each logical axis is split over.

    Weights are split ZeRO-3 fashion over every chip that sees other tokens, and collected before
    use: `kept_*` are axes as they are kept, which become those of `WHOLE`. Of the experts each
    device has a slice of every one, `mlp` being split over the expert axis too: the devices of a
    `group` share their tokens, and their work is even however tokens are routed.

    A TPU keeps an array's last axis in lanes of 128 and fills up what is no whole number of them,
    so that axes that come earlier take part of the split where they can.
    """

    batch: tuple[str, ...] = BATCH_AXES
    length: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ("tensor",)
    kept_vocab: tuple[str, ...] = ("tensor", "data", "expert")
    kept_embed: tuple[str, ...] = ("data",)
    kept_embed_alone: tuple[str, ...] = ("data", "expert")
    heads: tuple[str, ...] = ("tensor",)
    kept_heads: tuple[str, ...] = ("tensor", "expert")
    kv_heads: tuple[str, ...] = ("tensor",)
    kept_kv_heads: tuple[str, ...] = ("tensor", "expert")
    head_dim: tuple[str, ...] = ()
    group: tuple[str, ...] = ("expert",)
    experts: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ("expert", "tensor")
    mlp_rest: tuple[str, ...] = ("tensor",)
    stream_length: tuple[str, ...] = ("tensor",)


RULES = AxisRules()
# What the axes of a weight are when it is collected.
WHOLE = {
    "kept_vocab": "vocab",
    "kept_embed": None,
    "kept_embed_alone": None,
    "kept_heads": "heads",
    "kept_kv_heads": "kv_heads",
}


def make_mesh(
    data: int = -1,
    expert: int = 1,
    tensor: int = 1,
    slice: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh over `devices` (default: all of them); one size may be -1, the rest of the devices.

    Each axis follows the wires between chips as far as they go; slices differ along `slice` alone.
    Raises ConfigError when the sizes do not multiply to the number of devices, or `slice` is not
    the number of slices where there are several.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    sizes = resolve_mesh(
        MeshConfig(slice=slice, data=data, expert=expert, tensor=tensor), len(devices)
    )
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    kinds = (AxisType.Explicit,) * len(MESH_AXES)
    return Mesh(_arranged(shape, devices), MESH_AXES, axis_types=kinds)


def _arranged(shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    """The devices in the shape of the mesh, neighbours along its axes being near each other."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] != slices:
        raise ConfigError(
            f"mesh.slice={shape[0]} and the devices are of {slices} slices; mesh.slice={slices} "
            "would work."
        )
    inside, across = (1, *shape[1:]), (slices, *[1] * (len(shape) - 1))
    return mesh_utils.create_hybrid_device_mesh(
        inside, across, devices, allow_split_physical_axes=True
    )


def spec(*axes: str | None) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes (None: not split).

    Raises ValueError when two of them are split over the same mesh axis.
    """
    parts = [() if axis is None else getattr(RULES, axis) for axis in axes]
    used = [mesh_axis for part in parts for mesh_axis in part]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} are split twice over one of the mesh axes {used}")
    return PartitionSpec(*(part or None for part in parts))


def ambient_mesh():
    """The abstract mesh in force, or None; see `unsplit` for when one is not looked at."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.are_all_axes_auto else mesh


def platform() -> str:
    """What a program traced now is for, as "cpu" or "tpu": the mesh's devices, which need not be
    this machine's, or else the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """The kind of the devices that a program traced now is for, such as "TPU v6 lite"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def embed_last(x: jax.Array) -> jax.Array:
    """`x`, and its gradient, with the last axis in a TPU's lanes. What follows might want another
    layout, and XLA would have it where tokens of a whole group are, in place of one device's."""
    if platform() != "tpu":
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


@contextlib.contextmanager
def mesh_of(array: jax.Array):
    """Makes the mesh that `array` lives on the ambient one, if there is none yet."""
    mesh = jax.typeof(array).sharding.mesh
    if ambient_mesh() is not None or mesh.empty:
        yield
    else:
        with jax.sharding.use_abstract_mesh(mesh):
            yield


def unsplit(f: Callable) -> Callable:
    """`f`, within which there is no mesh if the ambient one is of one device.

    There is nothing to split there, and what says how to costs: each `shard_map` would have JAX
    keep copies of its weights for the backward pass, and XLA copy gradients to sum them over all.
    """
    mesh = ambient_mesh()
    if mesh is None or mesh.size > 1 or mesh.manual_axes:
        return f
    return jax.sharding.auto_axes(f, out_sharding=PartitionSpec())


def size(axis: str) -> int:
    """Number of parts that a logical axis is split into on the ambient mesh."""
    mesh = ambient_mesh()
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in getattr(RULES, axis))


def abstract(make: Callable, mesh: Mesh):
    """Shapes, types and placements on `mesh` of what `make()` would return."""

    def placed(leaf):
        # An array that was never placed, such as a scalar, is whole on every device.
        parts = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, parts))

    with jax.set_mesh(mesh):
        return jax.tree.map(placed, jax.eval_shape(make))


def kv_axis(num_kv_heads: int) -> str | None:
    """Logical axis of kv heads: none (every device has them all) when they are too few to split."""
    return None if num_kv_heads % size("kv_heads") else "kv_heads"


def stream_axes(length: int) -> Axes:
    """Axes of the residual stream of rows of this length: between blocks the devices that share
    heads and experts each keep some of the tokens (Korthikanti et al. 2022), where these divide."""
    return "batch", None if length % size("stream_length") else "stream_length", None


def table_axes(vocab_size: int, dtype: str) -> Axes:
    """Axes that the token table is kept in, of a model with parameters in `dtype`: split by rows
    where these can be. Beside int8 matrices, which only serve, few devices share it, since each
    token would collect it again."""
    if dtype == "int8":
        return "vocab", "kept_embed"
    if vocab_size % size("kept_vocab"):
        return "vocab", "kept_embed_alone"
    return "kept_vocab", None


def kept_head_axes(axis: str | None, number: int, dtype: str) -> tuple[str, str | None]:
    """Axes that `embed` and the heads of a matrix of attention are kept in: `axis`, "heads" or
    "kv_heads" or None, is that of the `number` heads when collected. See `table_axes`."""
    kept = f"kept_{axis}"
    if dtype == "int8":
        return "kept_embed", axis
    if axis is None or number % size(kept):
        return "kept_embed_alone", axis
    return "kept_embed", kept


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` split as its logical axes say."""
    return x if ambient_mesh() is None else jax.sharding.reshard(x, spec(*axes))


def gather(w: jax.Array, *axes: str | None) -> jax.Array:
    """A weight collected, as its users need it.

    Its gradient comes back as a sum still to be made over the chips that see other tokens, so
    the transposed moves are reduce-scatters. One mesh axis at a time: for several at once XLA sums
    arrays that are zero elsewhere, at twice the bytes.
    """
    if ambient_mesh() is None:
        return w
    left = whole(axes)
    for place in range(len(BATCH_AXES) - 1, -1, -1):
        collected = BATCH_AXES[place:]
        parts = [
            () if axis is None else _without(axis, keep, collected)
            for axis, keep in zip(axes, left, strict=True)
        ]
        reduced = PartitionSpec(*(part or None for part in parts), reduced=frozenset(collected))
        w = jax.sharding.reshard(w, reduced)
    return w


def _without(axis: str, keep: str | None, collected: tuple[str, ...]) -> tuple[str, ...]:
    """Mesh axes of a weight's axis that are left when these are collected."""
    kept = () if keep is None else getattr(RULES, keep)
    return tuple(name for name in getattr(RULES, axis) if name in kept or name not in collected)


def whole(axes: Axes) -> Axes:
    """The axes of a weight when it is collected."""
    return tuple(None if axis is None else WHOLE.get(axis, axis) for axis in axes)


def on_whole(f: Callable, x: jax.Array, lead: int) -> jax.Array:
    """`f(x)`, of x's shape, where f works on each entry of the first `lead` axes by itself and
    needs all of the axes after them.

    The entries are spread over as many of the devices that share x as divide their numbers, each
    runs `f` on its own, and the result goes back to where x lies. Other devices repeat the work.
    """
    if ambient_mesh() is None:
        return f(x)
    mesh, places = ambient_mesh(), jax.typeof(x).sharding.spec
    parts = [((part,) if isinstance(part, str) else part or ()) for part in places]
    spread = parts[:lead]
    for axis in (name for part in parts[lead:] for name in part):
        for dim in range(lead):
            devices = math.prod(mesh.shape[name] for name in (*spread[dim], axis))
            if x.shape[dim] % devices == 0:
                spread[dim] = (*spread[dim], axis)
                break
    where = PartitionSpec(*(part or None for part in spread), *(None,) * (x.ndim - lead))
    local = jax.shard_map(f, in_specs=where, out_specs=where)
    return jax.sharding.reshard(local(jax.sharding.reshard(x, where)), places)


def einsum(subscripts: str, *operands: jax.Array, axes: Axes, **options) -> jax.Array:
    """`jnp.einsum` whose result is split as `axes` says; sums over split axes are made whole."""
    if ambient_mesh() is not None:
        options["out_sharding"] = spec(*axes)
    return jnp.einsum(subscripts, *operands, **options)


def shard_map(
    f: Callable,
    in_axes: Sequence[Axes],
    out_axes: Axes | tuple[Axes, ...],
    *,
    check_vma: bool = True,
) -> Callable:
    """`f` run by each device on its own part; plain `f` when there is no mesh.

    `in_axes` holds the logical axes of each argument, `out_axes` those of the result or results.
    With `check_vma` JAX checks that what should be alike on several devices is; kernels that say
    nothing of it need it off.
    """
    if ambient_mesh() is None:
        return f

    def specs(axes: Any) -> Any:
        several = bool(axes) and isinstance(axes[0], tuple)
        return tuple(spec(*each) for each in axes) if several else spec(*axes)

    in_specs, out_specs = specs(tuple(in_axes)), specs(out_axes)
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)


# Collectives, for use inside `shard_map`: over the mesh axes of one logical axis.


def collect(w: jax.Array, axes: Axes) -> jax.Array:
    """A weight that is kept in `axes`, collected from all devices, as `gather` does it."""
    for name in reversed(BATCH_AXES):
        for dim, (axis, keep) in enumerate(zip(axes, whole(axes), strict=True)):
            kept = () if keep is None else _mesh_axes(keep)
            if axis is not None and name in _split_axes(axis) and name not in kept:
                if dim == w.ndim - 1:
                    w = _as_kept(w)
                w = jax.lax.all_gather(w, name, axis=dim, tiled=True)
    return w


@jax.custom_vjp
def _as_kept(w: jax.Array) -> jax.Array:
    """A part of a weight of which the last axis is to be collected.

    What is collected has that axis first in memory; unless its part is told to lie as it is kept,
    XLA turns the parts of all layers round before the loop over them. Its gradient may lie as it
    comes from the sum over devices.
    """
    return embed_last(w)


_as_kept.defvjp(lambda w: (embed_last(w), None), lambda _, dw: (dw,))


def _mesh_axes(axis: str) -> tuple[str, ...]:
    return () if ambient_mesh() is None else getattr(RULES, axis)


def _split_axes(axis: str) -> tuple[str, ...]:
    """Those of more than one device; XLA would copy an array that it gathers from one alone."""
    mesh = ambient_mesh()
    return tuple(name for name in _mesh_axes(axis) if mesh is not None and mesh.shape[name] > 1)


def all_gather(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """The parts of `x` along `axis` of all devices, joined on dimension `dim`."""
    names = _split_axes(axis)
    return jax.lax.all_gather(x, names, axis=dim, tiled=True) if names else x


def psum(x: jax.Array, axis: str) -> jax.Array:
    """The sum of `x` over the devices along `axis`."""
    names = _mesh_axes(axis)
    return jax.lax.psum(x, names) if names else x


def pmax(x: jax.Array, axis: str) -> jax.Array:
    """The largest of `x` over the devices along `axis`."""
    names = _mesh_axes(axis)
    return jax.lax.pmax(x, names) if names else x


def psum_scatter(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """The sum of `x` over the devices along `axis`, each keeping its part of dimension `dim`."""
    names = _split_axes(axis)
    return jax.lax.psum_scatter(x, names, scatter_dimension=dim, tiled=True) if names else x


def index(axis: str) -> jax.Array | int:
    """Which part of `axis` this device has."""
    names = _mesh_axes(axis)
    return jax.lax.axis_index(names) if names else 0


def vary(x: jax.Array) -> jax.Array:
    """`x` typed as possibly different on every device, so that its gradient is summed over all."""
    mesh = ambient_mesh()
    manual = () if mesh is None else mesh.manual_axes
    same = tuple(name for name in manual if name not in jax.typeof(x).mat.varying)
    return jax.lax.pcast(x, same, to="varying") if same else x
