"""The process that compiles one program for one slice: a request as a line of JSON on standard
input, which stays open, JSON lines on standard output: phases that begin, last the measurements or
an error. It is a process of its own since JAX and libtpu read their environment once, and as it can
be killed meanwhile."""

import dataclasses
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import serialize_executable, topologies
from jax.sharding import Mesh

from grok import sharding
from grok.config import MESH_AXES, RunConfig, check_trainable
from grok.config.load import from_dict
from grok.errors import ConfigError, GrokError
from grok.hardware import CHIPS
from grok.model.mesh_fit import check_matmul_dtype, check_plan_fits
from grok.ops.attention.paged import KV_BLOCK
from grok.plan.compile_errors import compiler_error, is_out_of_hbm
from grok.plan.program_cost import CompiledProgram
from grok.plan.programs import bytes_per_device, make_program, total_bytes
from grok.plan.rates import Rates, resource_seconds
from grok.plan.schedule import Schedule
from grok.plan.topology import Slice, parse_slice


def main() -> None:
    """Answers the request on standard input."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        slice_ = parse_slice(request["topology"], request["slices"])
        measured = compile_step(from_dict(request["config"]), slice_, request)
    except GrokError as error:
        _send({"error": str(error), "code": error.exit_code})
    else:
        _send({"measured": measured})


def compile_step(config: RunConfig, slice_: Slice, request: dict[str, Any]) -> dict[str, Any]:
    """Measurements of the compiled program, per device, for `grok.plan.estimate`; of one that does
    not fit, the compiler's message instead of costs."""
    devices = topology_devices(slice_)
    per_chip = len(devices) // slice_.num_chips
    if config.plan.program == "train":
        check_trainable(config)
    check_matmul_dtype(config.model, devices[0].device_kind)
    sizes = check_plan_fits(config, len(devices))
    mesh = sharding.make_mesh(**sizes, devices=devices)
    measured: dict[str, Any] = {"mesh_sizes": sizes, "devices_per_chip": per_chip}
    _send({"phase": "tracing the step"})
    with jax.set_mesh(mesh):
        program = make_program(config, mesh)
        measured["checkpoint"] = total_bytes(program.arguments.get("state"))
        arguments = bytes_per_device(program.arguments)
        largest = sorted(arguments.items(), key=lambda item: -item[1])[:3]
        measured |= {"state": sum(arguments.values()), "largest_state": largest}
        if measured["state"] * per_chip > slice_.chip.hbm:
            return measured | {"compiler_message": None}
        start = time.monotonic()
        lowered = program.jitted.lower(*program.arguments.values())
        _send({"phase": "compiling; a full-size program takes minutes"})
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_hbm(str(error)):
                raise compiler_error(str(error), config, sizes) from None
            return measured | {"compiler_message": str(error)}
    measured["compile_seconds"] = time.monotonic() - start
    _send({"phase": "counting costs"})
    text = compiled.as_text()
    assert text is not None
    if "dump" in request:
        Path(request["dump"]).write_text(text)
    if "save" in request:
        Path(request["save"]).write_bytes(serialize_executable.serialize(compiled)[0])
    compiled_program = CompiledProgram(text, sizes, cache_loop_count(config))
    program_costs = costs(compiled_program, mesh, slice_)
    rates = Rates(**request["rates"])
    schedule = walk(compiled_program, rates, program_costs["wiring"], per_chip)
    return measured | memory(compiled) | program_costs | {"schedule": schedule}


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes of HBM and of host memory that the compiler allocates on one device."""
    stats = compiled.memory_analysis()
    assert stats is not None
    peak = stats.peak_memory_in_bytes
    if stats.host_temp_size_in_bytes:  # then it may be of host memory; HBM has its allocations
        peak = min(peak, stats.total_allocation_bytes)
    host = stats.host_temp_size_in_bytes + stats.host_argument_size_in_bytes
    return {"state": stats.argument_size_in_bytes, "peak": peak, "host_memory": host}


def costs(program: CompiledProgram, mesh: Mesh, slice_: Slice) -> dict[str, Any]:
    """Costs of the program, and the wiring of the mesh axes that its collectives use."""
    cost = program.cost()
    return {
        **{name: getattr(cost, name) for name in ("flops", "flops_8bit", "hbm", "host")},
        "collectives": [[*key, sent] for key, sent in sorted(cost.collectives.items())],
        "loops": sorted(cost.loops),
        "kernels": sorted(cost.kernels),
        "largest_temporaries": program.largest_arrays(5),
        "wiring": {
            axes: wiring(mesh, axes, slice_) for axes in program.collective_axes() if axes != "none"
        },
    }


def walk(
    program: CompiledProgram, rates: Rates, wiring: dict[str, Any], per_chip: int
) -> dict[str, Any]:
    """The time of the program's schedule, and the operations that it waits for the longest."""
    step = Schedule(program, lambda cost: resource_seconds(cost, rates, wiring, per_chip)).walk()
    return {
        "seconds": step.seconds,
        "sent": step.sent,
        "sent_beside": step.sent_beside,
        "exposed": sum(step.exposed.values()),
        "longest_waits": sorted(step.exposed.items(), key=lambda wait: -wait[1])[:5],
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


def cache_loop_count(config: RunConfig) -> int:
    """Iterations of a loop over the KV cache, the only loop whose count a program leaves open: to
    the end of the longest row, from the first key that a token of the step sees."""
    tokens, keys = config.plan.tokens, max(KV_BLOCK, config.engine.page_size)
    window = config.model.attention.window if config.plan.program == "decode" else None
    return -(-tokens // keys) - max(0, tokens - (window or tokens)) // keys


def wiring(mesh: Mesh, axes: str, slice_: Slice) -> dict[str, Any]:
    """Wiring of the chips that differ along these mesh axes: `links` of a chip to others of them in
    its slice, of which groups that lie between each other's chips have a part each; `hops` between
    two on average; if they span `slices`; and `shared`, devices of one chip among them."""
    names = axes.split("+")
    index = tuple(slice(None) if axis in names else 0 for axis in MESH_AXES)
    devices = mesh.devices[index].reshape(-1)
    if slice_.generation not in CHIPS:  # in no grid: one way to the others
        return {"links": 1.0, "hops": 1.0, "slices": False, "shared": 1}
    coords = np.array([device.coords for device in devices])[:, : len(slice_.shape)]
    links, hops = 0.0, 0.0
    for side, length in enumerate(slice_.shape):
        places = np.unique(coords[:, side])
        if len(places) > 1:
            apart = int(np.diff(places).min())
            is_ring = len(places) * apart == length and slice_.is_ring(side)
            links += (1 + is_ring) / apart
            hops += len(places) * apart / (3 + is_ring)
    between = slice_.count > 1 and "slice" in names
    shared = len(devices) // len(np.unique(coords, axis=0)) if not between else 1
    return {"links": links, "hops": hops, "slices": between, "shared": shared}


def _exit_with_parent() -> None:
    """Ends this process where the one that asked is gone: the compiler itself would go on."""
    sys.stdin.read()
    os._exit(1)


def _send(message: dict[str, Any]) -> None:
    print(json.dumps(message, default=dataclasses.asdict), flush=True)


if __name__ == "__main__":
    main()
