"""Devices along each axis of the mesh, and the meshes that a model can be split over."""

import dataclasses
import math
from typing import Annotated

from grok.config.model import ModelConfig
from grok.config.numbers import CountOrZero, divisors
from grok.config.section import Section
from grok.errors import ConfigError

MESH_AXES = ("slice", "data", "expert", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Section):
    """Number of devices along each mesh axis; one may be -1: all that remain."""

    slice: Annotated[int, "slices joined by the data-centre network; the batch"] = 1
    data: Annotated[int, "the batch; parameters and optimizer state (ZeRO-3)"] = -1
    expert: Annotated[int, "the width of each expert; the batch"] = 1
    tensor: Annotated[int, "heads, the width of each expert, the vocabulary"] = 1
    simulated_devices: Annotated[
        CountOrZero, "CPU devices to simulate, over all hosts; 0: real devices"
    ] = 0


def resolve_mesh(
    mesh: MeshConfig, num_devices: int, model: ModelConfig | None = None
) -> dict[str, int]:
    """Sizes of the four mesh axes on `num_devices` devices, with -1 filled in.

    Raises ConfigError when a size is not positive, more than one is -1, or they do not multiply
    to the number of devices. The mesh that it then proposes suits `model`, where one is given.
    """
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise ConfigError(
                f"mesh.{axis}={size} is no number of devices; mesh.{axis}=1 would work."
            )
    if len(open_axes) > 1:
        raise ConfigError(
            f"mesh.{open_axes[0]} and mesh.{open_axes[1]} are both -1, and only one axis can take "
            f"the devices that remain; mesh.{open_axes[1]}=1 would work."
        )
    given = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and num_devices % given == 0:
        sizes[open_axes[0]] = num_devices // given
    elif open_axes or given != num_devices:
        raise ConfigError(
            f"mesh {_x(sizes)} needs {'a multiple of ' if open_axes else ''}{given} devices, and "
            f"there are {num_devices}; mesh {_x(_nearest_mesh(sizes, num_devices, model))} "
            "would work."
        )
    return sizes


def batch_shards(sizes: dict[str, int]) -> int:
    """Number of shards of a batch on a mesh of these sizes."""
    return sizes["slice"] * sizes["data"] * sizes["expert"]


def check_model_fits(model: ModelConfig, sizes: dict[str, int]) -> None:
    """Refuse, as ConfigError, a mesh over which an axis of the model cannot be split evenly."""
    problem = _misfit(model, sizes)
    if problem:
        near = _nearest_mesh(sizes, math.prod(sizes.values()), model)
        raise ConfigError(f"{problem}; mesh {_x(near)} would work.")


def _misfit(model: ModelConfig, sizes: dict[str, int]) -> str:
    """Names the axis of the model that cannot be split over the mesh; empty if all can."""
    tensor, expert, shards = sizes["tensor"], sizes["expert"], sizes["data"] * sizes["expert"]
    rules = (
        ("attention.num_heads", model.attention.num_heads, "mesh.tensor", tensor),
        ("moe.dim", model.moe.dim, "mesh.expert*mesh.tensor", expert * tensor),
        ("vocab_size", model.vocab_size, "mesh.tensor", tensor),
        ("embed_dim", model.embed_dim, "mesh.data*mesh.expert", shards),
    )
    for key, number, axes, size in rules:
        if number % size:
            return f"model.{key}={number} cannot be split over {axes}={size}"
    kv_heads = model.attention.num_kv_heads
    if kv_heads % tensor and tensor % kv_heads:
        return (
            f"model.attention.num_kv_heads={kv_heads} can be neither split nor repeated over "
            f"mesh.tensor={tensor}"
        )
    return ""


def _nearest_mesh(
    wanted: dict[str, int], num_devices: int, model: ModelConfig | None
) -> dict[str, int]:
    """The mesh of exactly `num_devices` that suits `model` and is nearest to `wanted`.

    Replicas change last; of the others, data takes what the rest leaves. One always exists:
    whole replicas on single devices.
    """
    meshes = (
        {"slice": slices, "data": num_devices // (slices * expert * tensor)}
        | {"expert": expert, "tensor": tensor}
        for slices in divisors(num_devices)
        for expert in divisors(num_devices // slices)
        for tensor in divisors(num_devices // (slices * expert))
    )

    def distance(sizes: dict[str, int]) -> tuple[float, float]:
        apart = {axis: abs(math.log(sizes[axis] / max(1, wanted[axis]))) for axis in sizes}
        return apart["slice"], apart["expert"] + apart["tensor"]

    return min((m for m in meshes if model is None or not _misfit(model, m)), key=distance)


def _x(sizes: dict[str, int]) -> str:
    """`slice=1 x data=2 x ...` for messages."""
    return " x ".join(f"{axis}={sizes[axis]}" for axis in MESH_AXES)
