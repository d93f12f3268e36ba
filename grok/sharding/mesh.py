"""The mesh: made over devices, found in the context, put into it."""

import contextlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from grok.config import MESH_AXES, MeshConfig, resolve_mesh
from grok.errors import ConfigError
from grok.sharding.blocks import block_grid


def make_mesh(
    data: int = -1,
    expert: int = 1,
    tensor: int = 1,
    slice: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh over `devices` (default: all of them); one size may be -1, the rest of the devices.

    Neighbours along an axis are linked chips as far as the topology allows; slices differ along
    `slice` alone. Raises ConfigError when the sizes do not multiply to the number of devices, or
    `slice` is not the number of slices where there are several.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    sizes = resolve_mesh(
        MeshConfig(slice=slice, data=data, expert=expert, tensor=tensor), len(devices)
    )
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    axis_types = (AxisType.Explicit,) * len(MESH_AXES)
    return Mesh(_device_grid(shape, devices), MESH_AXES, axis_types=axis_types)


def _device_grid(shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    """The devices in the shape of the mesh, linked chips beside each other."""
    by_slice: dict[int, list[jax.Device]] = {}
    for device in devices:
        by_slice.setdefault(getattr(device, "slice_index", 0), []).append(device)
    if len(by_slice) == 1:
        return _slice_grid(shape, devices)
    if shape[0] != len(by_slice):
        raise ConfigError(
            f"mesh.slice={shape[0]} and the devices are of {len(by_slice)} slices; "
            f"mesh.slice={len(by_slice)} would work."
        )
    grids = [_slice_grid((1, *shape[1:]), by_slice[index]) for index in sorted(by_slice)]
    return np.concatenate(grids)


def _slice_grid(shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    blocks = block_grid(shape, devices)
    if blocks is not None:
        return blocks
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def ambient_mesh():
    """The abstract mesh in force, or None, as inside `without_trivial_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.are_all_axes_auto else mesh


@contextlib.contextmanager
def use_mesh_of(array: jax.Array):
    """Makes the mesh that `array` lives on the ambient one, if there is none yet."""
    mesh = jax.typeof(array).sharding.mesh
    if ambient_mesh() is not None or mesh.empty:
        yield
    else:
        with jax.sharding.use_abstract_mesh(mesh):
            yield


def without_trivial_mesh(f: Callable) -> Callable:
    """`f`, run without a mesh if the ambient one has a single device.

    A trivial mesh costs time: for each `shard_map` JAX would keep copies of its weights for the
    backward pass, and XLA copy gradients to sum them over one device.
    """
    mesh = ambient_mesh()
    if mesh is None or mesh.size > 1 or mesh.manual_axes:
        return f
    return jax.sharding.auto_axes(f, out_sharding=PartitionSpec())


def abstract_arrays(make: Callable, mesh: Mesh, *args):
    """Shapes, types and shardings on `mesh`, which may be abstract, of the arrays that
    `make(*args)` would return."""

    def with_sharding(leaf):
        # An array without a sharding, such as a scalar, is replicated.
        partition = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
        sharding = NamedSharding(mesh, partition)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.tree.map(with_sharding, jax.eval_shape(make, *args))
