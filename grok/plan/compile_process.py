"""The process that compiles: one program for one slice, with no accelerator.

It reads a request as JSON from standard input, and writes lines of JSON to standard output: what
it is doing, and last what was found, or the sentence of an error. A process of its own, since JAX
and libtpu read their environment once, and a compiler that takes minutes can then be interrupted.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import serialize_executable, topologies
from jax.sharding import Mesh

from grok import sharding
from grok.config import (
    MESH_AXES,
    RunConfig,
    check_fits,
    check_model_fits,
    check_trainable,
    resolve_mesh,
)
from grok.config.load import from_dict
from grok.errors import ConfigError, GrokError
from grok.ops.attention.paged import KV_BLOCK
from grok.plan.program_cost import CompiledProgram
from grok.plan.programs import bytes_per_device, make_program
from grok.plan.topology import Slice, parse_slice


def main() -> None:
    """Answers the request on standard input."""
    request = json.load(sys.stdin)
    try:
        slice_ = parse_slice(request["topology"], request["slices"])
        answer: dict[str, Any] = {"found": plan(from_dict(request["config"]), slice_, request)}
    except GrokError as error:
        answer = {"error": str(error), "code": error.exit_code}
    _tell(answer)


def plan(config: RunConfig, slice_: Slice, request: dict[str, Any]) -> dict[str, Any]:
    """What `grok.plan.estimate` needs to know of the compiled program; of one that does not fit,
    the compiler's account instead of costs."""
    devices = topology_devices(slice_)
    per_chip = len(devices) // slice_.num_chips
    sizes = mesh_sizes(config, len(devices))
    mesh = sharding.make_mesh(**sizes, devices=devices)
    found: dict[str, Any] = {"sizes": sizes, "devices_per_chip": per_chip}
    _tell({"phase": "tracing the step"})
    with jax.set_mesh(mesh):
        program = make_program(config, mesh)
        parts = bytes_per_device(program.arguments)
        found |= {"state": sum(parts.values()), "largest_state": largest(parts)}
        if found["state"] * per_chip > slice_.chip.hbm:
            return found | {"account": None}
        began = time.monotonic()
        jitted = jax.jit(program.function, donate_argnums=program.donate)
        lowered = jitted.lower(*program.arguments.values())
        _tell({"phase": "compiling; a full-size program takes minutes"})
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return found | {"account": str(error)}
    found["compile_seconds"] = time.monotonic() - began
    _tell({"phase": "counting what the program does"})
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    if "dump" in request:
        Path(request["dump"]).write_text(text)
    if "save" in request:
        Path(request["save"]).write_bytes(serialize_executable.serialize(compiled)[0])
    peak, on_hosts = memory.peak_memory_in_bytes, memory.host_temp_size_in_bytes
    if on_hosts:  # Then that peak is of the memory with more: what HBM has to hold is nearer.
        peak = min(peak, memory.total_allocation_bytes)
    on_hosts += memory.host_argument_size_in_bytes
    found |= {"state": memory.argument_size_in_bytes, "peak": peak, "on_hosts": on_hosts}
    return found | counted(CompiledProgram(text, sizes, turns(config)), mesh, slice_)


def counted(program: CompiledProgram, mesh: Mesh, slice_: Slice) -> dict[str, Any]:
    """The costs of the program, and how the mesh axes are wired that its collectives go over."""
    cost = program.cost()
    return {
        "flops": cost.flops,
        "hbm": cost.hbm,
        "host": cost.host,
        "collectives": [[*key, sent] for key, sent in sorted(cost.collectives.items())],
        "loops": sorted(cost.loops),
        "kernels": sorted(cost.kernels),
        "largest_temporaries": program.largest_arrays(5),
        "wires": {across: wires(mesh, across, slice_) for across, _ in cost.collectives},
    }


def topology_devices(slice_: Slice) -> list[jax.Device]:
    """The devices of the slice, as the compiler knows them."""
    options: dict[str, Any] = {"num_slices": slice_.count} if slice_.count > 1 else {}
    if slice_.generation == "v4":
        options["chip_config_name"] = "megacore"  # a chip as one device, as Cloud TPUs show it
    name = slice_.name if slice_.generation != "7x" else f"tpu{slice_.name}"
    try:
        return list(topologies.get_topology_desc(name, platform="tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"libtpu knows no topology {slice_.name}: {error}.") from None


def mesh_sizes(config: RunConfig, num_devices: int) -> dict[str, int]:
    """Sizes of the mesh axes, after checking that model and batch can be split over them."""
    if config.plan.program == "train":
        check_trainable(config)
        return check_fits(config, num_devices)
    sizes = resolve_mesh(config.mesh, num_devices, config.model)
    check_model_fits(config.model, sizes)
    rows = sizes["slice"] * sizes["data"] * sizes["expert"]
    if config.plan.batch_size % rows:
        raise ConfigError(
            f"plan.batch_size={config.plan.batch_size} cannot be split over slice*data*expert="
            f"{rows}; plan.batch_size={-(-config.plan.batch_size // rows) * rows} would work."
        )
    return sizes


def turns(config: RunConfig) -> int:
    """How often a loop over the cache runs, the only one whose count a program leaves open: as far
    as the rows are long."""
    return -(-config.plan.tokens // max(KV_BLOCK, config.engine.page_size))


def wires(mesh: Mesh, across: str, slice_: Slice) -> dict[str, Any]:
    """How chips that differ along these mesh axes are wired: `links` that a chip has to others of
    them in its slice, steps (`hops`) between two on average, and whether slices differ."""
    names = across.split("+")
    taken = tuple(slice(None) if axis in names else 0 for axis in MESH_AXES)
    devices = mesh.devices[taken].reshape(-1)
    coords = np.array([device.coords for device in devices])[:, : len(slice_.shape)]
    links, hops = 0, 0.0
    for side, length in enumerate(slice_.shape):
        used = len(set(coords[:, side]))
        if used > 1:
            closed = used == length and slice_.is_ring(side)
            links += 2 if closed else 1
            hops += used / (4 if closed else 3)
    return {"links": links, "hops": hops, "slices": slice_.count > 1 and "slice" in names}


def largest(parts: dict[str, int], number: int = 3) -> list[tuple[str, int]]:
    """The largest of them, first the largest."""
    return sorted(parts.items(), key=lambda part: -part[1])[:number]


def _tell(message: dict[str, Any]) -> None:
    print(json.dumps(message, default=dataclasses.asdict), flush=True)


if __name__ == "__main__":
    main()
