"""Devices along each axis of the mesh."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Annotated

from grok.config.section import CountOrZero, Section, divisors
from grok.errors import ConfigError, bad_value

MESH_AXES = ("slice", "data", "expert", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Section):
    """Number of devices along each mesh axis; one may be -1: all that remain."""

    slice: Annotated[int, "slices joined by the data-centre network; the batch"] = 1
    data: Annotated[int, "the batch; parameters and optimizer state (ZeRO-3)"] = -1
    expert: Annotated[int, "the width of each expert; the batch"] = 1
    tensor: Annotated[int, "heads, the width of each expert, the vocabulary"] = 1
    simulated_devices: Annotated[CountOrZero, "CPU devices to simulate, on all hosts; 0: none"] = 0


def resolve_mesh(
    mesh: MeshConfig, num_devices: int, misfit: Callable[[dict[str, int]], str] = lambda sizes: ""
) -> dict[str, int]:
    """Sizes of the four mesh axes on `num_devices` devices, with -1 filled in. `misfit` says why a
    model cannot be split over some sizes; empty if it can. Raises ConfigError, with the nearest
    mesh that fits, when it cannot or the sizes do not multiply to the devices."""
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise bad_value(f"mesh.{axis}", size, "is no number of devices", 1)
    if len(open_axes) > 1:
        problem = f"mesh.{open_axes[0]} and mesh.{open_axes[1]} are both -1, and only one axis can"
        right = f"mesh.{open_axes[1]}=1 would work"
        raise ConfigError(f"{problem} take the devices that remain; {right}.")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if num_devices % fixed or not (open_axes or fixed == num_devices):
        multiple = "a multiple of " if open_axes else ""
        problem = f"mesh {_x(sizes)} needs {multiple}{fixed} devices, and there are {num_devices}"
    else:
        sizes |= dict.fromkeys(open_axes, num_devices // fixed)
        problem = misfit(sizes)
    if problem:
        near = _x(_nearest_mesh(sizes, num_devices, misfit))
        raise ConfigError(f"{problem}; mesh {near} would work.")
    return sizes


def num_devices_of(mesh: MeshConfig, on_host: int) -> int:
    """Devices of a host that a mesh takes: as many as it needs, and all where an axis is -1."""
    sizes = [getattr(mesh, axis) for axis in MESH_AXES]
    return on_host if -1 in sizes else min(on_host, math.prod(sizes))


def batch_shards(sizes: dict[str, int]) -> int:
    """Number of shards of a batch on a mesh of these sizes."""
    return sizes["slice"] * sizes["data"] * sizes["expert"]


def meshes(num_devices: int, slices: int = 1) -> Iterator[dict[str, int]]:
    """Sizes of all meshes of so many devices in so many slices."""
    per_slice = num_devices // slices
    for expert in divisors(per_slice):
        for tensor in divisors(per_slice // expert):
            data = per_slice // (expert * tensor)
            yield {"slice": slices, "data": data, "expert": expert, "tensor": tensor}


def _nearest_mesh(
    sizes: dict[str, int], num_devices: int, misfit: Callable[[dict[str, int]], str]
) -> dict[str, int]:
    """The mesh that fits and is nearest to `sizes`. Replicas change last; of the others, data takes
    what the rest leaves. One always exists: whole replicas on single devices."""

    def distance(mesh: dict[str, int]) -> tuple[float, float]:
        apart = {axis: abs(math.log(mesh[axis] / max(1, sizes[axis]))) for axis in mesh}
        return apart["slice"], apart["expert"] + apart["tensor"]

    candidates = (m for slices in divisors(num_devices) for m in meshes(num_devices, slices))
    return min((mesh for mesh in candidates if not misfit(mesh)), key=distance)


def _x(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis}={sizes[axis]}" for axis in MESH_AXES)
