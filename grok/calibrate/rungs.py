"""The model whose steps are timed where the user names none, and sizes of the steps."""

import dataclasses
from collections.abc import Sequence

from grok.config import PlanConfig, RunConfig
from grok.config.load import load_config
from grok.config.mesh import MeshConfig, batch_shards, resolve_mesh
from grok.model.params import num_parameters

CPU_RUNG, RUNGS = "grok-10m", ("grok-8b", "grok-1b", "grok-100m", "grok-10m")
BYTES_PER_PARAMETER = 16  # parameter, gradient and two moments, in float32
STATE_SHARE = 0.4  # of the devices' memory


def choose_rung(is_cpu: bool, memory: int) -> str:
    """A preset whose training leaves most of the devices' `memory` (bytes, of all) free: the
    largest, or on CPUs the one that takes seconds."""
    if is_cpu:
        return CPU_RUNG
    fits = (
        rung
        for rung in RUNGS
        if BYTES_PER_PARAMETER * num_parameters(load_config(rung).model) < STATE_SHARE * memory
    )
    return next(fits, RUNGS[-1])


def step_config(preset: str, overrides: Sequence[str], is_cpu: bool, num_devices: int) -> RunConfig:
    """The run whose training step is timed. The user's `overrides` come last; before them, rows and
    their length as the devices like them, and on CPUs float32, which they compute in."""
    length, rows, types = (128, 8, ["model.compute_dtype=float32", "model.remat=none"])
    if not is_cpu:
        length, rows, types = 2048, 4 * num_devices, []
    shards = batch_shards(_mesh_sizes(preset, overrides, num_devices))
    batch = -(-rows // shards) * shards
    sizes = [f"data.sequence_length={length}", f"data.batch_size={batch}"]
    return load_config(preset, [*types, *sizes, *overrides])


def _mesh_sizes(preset: str, overrides: Sequence[str], num_devices: int) -> dict[str, int]:
    mesh: MeshConfig = load_config(preset, overrides).mesh
    return resolve_mesh(mesh, num_devices)


def decode_config(config: RunConfig, is_cpu: bool, num_devices: int) -> RunConfig:
    """The same model's decode step: a row a device, or several."""
    shards = batch_shards(resolve_mesh(config.mesh, num_devices))
    rows = -(-(8 if is_cpu else 8 * num_devices) // shards) * shards
    tokens = min(config.model.context_length, 256 if is_cpu else 2048)
    plan = PlanConfig(program="decode", batch_size=rows, tokens=tokens)
    return dataclasses.replace(config, plan=plan)
