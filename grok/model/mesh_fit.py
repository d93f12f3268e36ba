"""Meshes that a model and its batches can be split over, checked before anything compiles.

Each axis of a weight must be divisible by the devices that it is used or stored over.
"""

import functools
import math

from grok.config import MeshConfig, ModelConfig, RunConfig, resolve_mesh
from grok.config.mesh import batch_shards
from grok.config.section import round_up
from grok.errors import ConfigError, bad_value
from grok.hardware import CHIPS, generation_of
from grok.model.params import param_specs
from grok.sharding.rules import mesh_axes

# Logical axes of weights -> the config key of their size, in the order in which they are refused.
KEYS = {
    "heads": "attention.num_heads",
    "mlp": "{module}.dim",
    "vocab": "vocab_size",
    "embed": "embed_dim",
    "kv_heads": "attention.num_kv_heads",
}
STORED_AS = {"embed": "fsdp_embed_only"}  # axes that are only sharded where they are stored
REPEATABLE = ("kv_heads",)  # axes that may be repeated instead: fewer of them than devices


def misfit(model: ModelConfig, sizes: dict[str, int]) -> str:
    """Names the axis of the model that cannot be split over mesh axes of these sizes; empty if all
    can."""
    for axis, key in KEYS.items():
        over = mesh_axes(STORED_AS.get(axis, axis))
        shards = math.prod(sizes[name] for name in over)
        verb = "can be neither split nor repeated" if axis in REPEATABLE else "cannot be split"
        for spec in param_specs(model).values():
            size = spec.shape[spec.axes.index(axis)] if axis in spec.axes else shards
            if size % shards and not (axis in REPEATABLE and shards % size == 0):
                key, axes = key.format(module=spec.module), "*mesh.".join(over)
                return f"model.{key}={size} {verb} over mesh.{axes}={shards}"
    return ""


def fit_mesh(mesh: MeshConfig, num_devices: int, model: ModelConfig) -> dict[str, int]:
    """Sizes of the mesh axes on `num_devices` devices; ConfigError, with a mesh that would work, if
    they do not multiply to those or the model cannot be split over them."""
    return resolve_mesh(mesh, num_devices, functools.partial(misfit, model))


def check_fits(config: RunConfig, num_devices: int) -> dict[str, int]:
    """Sizes of the mesh axes on `num_devices` devices.

    Raises ConfigError, with a value that would work, if the model or a batch of training cannot be
    split over them.
    """
    sizes = fit_mesh(config.mesh, num_devices, config.model)
    batch, steps = config.data.batch_size, config.train.grad_accum_steps
    _check_batch("data.batch_size", batch, sizes)
    rows = batch_shards(sizes) * steps
    if batch % rows:
        raise ConfigError(
            f"data.batch_size={batch} cannot be split into train.grad_accum_steps={steps} "
            f"microbatches over slice*data*expert={batch_shards(sizes)}; "
            f"data.batch_size={round_up(batch, rows)} would work."
        )
    for step, batch, length in config.data.shapes():
        if batch % rows:
            nearest = round_up(batch, math.lcm(rows, config.data.sequence_length // length))
            raise ConfigError(
                f"data.batch_schedule has batch_size={batch} from step {step}, which cannot be "
                f"split over slice*data*expert*train.grad_accum_steps={rows}; {nearest} would work."
            )
    return sizes


def check_matmul_dtype(model: ModelConfig, device_kind: str) -> None:
    """Refuses, as ConfigError, products in 8 bits on TPUs where these are not known to be faster;
    devices of an unknown kind, such as CPUs, may multiply them as floats."""
    generation, dtype = generation_of(device_kind), model.matmul_dtype
    if generation is None or dtype == "compute" or dtype in CHIPS[generation].flops_8bit:
        return
    # Quantised parameters are multiplied in int8 alone.
    types = () if model.is_quantized else CHIPS[generation].flops_8bit
    faster = next(iter(types), "compute")
    problem = f"is not known to be faster than bfloat16 on {generation}"
    raise bad_value("model.matmul_dtype", dtype, problem, faster)


def check_plan_fits(config: RunConfig, num_devices: int) -> dict[str, int]:
    """`check_fits` for the program and batch that `grok plan` compiles."""
    if config.plan.program == "train":
        return check_fits(config, num_devices)
    sizes = fit_mesh(config.mesh, num_devices, config.model)
    _check_batch("plan.batch_size", config.plan.batch_size, sizes)
    return sizes


def _check_batch(key: str, rows: int, sizes: dict[str, int]) -> None:
    shards = batch_shards(sizes)
    if rows % shards:
        raise ConfigError(
            f"{key}={rows} cannot be split over slice*data*expert={shards}; "
            f"{key}={round_up(rows, shards)} would work."
        )
