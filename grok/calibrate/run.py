"""`grok calibrate`: everything that it measures, into one dated object."""

import dataclasses
import datetime
import importlib.metadata
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from grok import __version__, distributed, sharding
from grok.calibrate import collectives, kernels, rates
from grok.calibrate.rates import Devices
from grok.calibrate.rungs import choose_rung, decode_config, step_config
from grok.calibrate.steps import make_step, time_step
from grok.calibrate.timing import Timing
from grok.calibrate.verdict import describe_kernels, describe_rates
from grok.config import RunConfig
from grok.hardware import chip_of, generation_of
from grok.model.mesh_fit import check_fits
from grok.plan.calibration import VERSION, Calibration
from grok.plan.compile_process import wiring
from grok.plan.local import CompiledStep, slice_of
from grok.plan.rates import published_rates, transfer_seconds

OnPhase = Callable[[str], None]


def calibrate(
    preset: str | None,
    overrides: Sequence[str],
    parts: Sequence[str],
    cpu_time: bool,
    on_phase: OnPhase,
) -> Calibration:
    """Measures `parts` on all devices; every process of them makes the same call. `preset`: the
    model whose steps are timed, None: one that suits the devices."""
    devices = jax.devices()
    is_cpu = devices[0].platform == "cpu"
    slice_ = slice_of(devices)
    preset = preset or choose_rung(is_cpu, slice_.num_chips * slice_.chip.hbm)
    config = step_config(preset, overrides, is_cpu, len(devices))
    mesh = sharding.make_mesh(**check_fits(config, len(devices)), devices=devices)
    clock = time.process_time if cpu_time else time.perf_counter
    calibration = _empty(mesh, "cpu" if cpu_time else "wall")
    results = _kernels(on_phase) if "kernels" in parts else []
    listed = [dataclasses.asdict(result) | {"is_wrong": result.is_wrong} for result in results]
    calibration = dataclasses.replace(calibration, kernels=listed)
    if "rates" in parts:
        measured = _rates(Devices(mesh, clock), on_phase)
        calibration = dataclasses.replace(calibration, **measured)
    if "steps" in parts:
        configs = config, decode_config(config, is_cpu, len(devices))
        steps: dict[str, dict[str, Any]] = {}
        for program in configs:
            steps[program.plan.program] = _step(preset, program, mesh, calibration, clock, on_phase)
        calibration = dataclasses.replace(calibration, steps=steps)
    verdict = (describe_kernels(results) if results else []) + describe_rates(calibration)
    return dataclasses.replace(calibration, verdict=verdict)


def _empty(mesh: Mesh, clock: str) -> Calibration:
    device = mesh.devices.flat[0]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    return Calibration(
        version=VERSION,
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        code={"grok": __version__, **versions},
        device={
            "platform": device.platform,
            "kind": device.device_kind,
            "count": mesh.size,
            "processes": distributed.process_count(),
            "cores": os.cpu_count(),
        },
        clock=clock,
        mesh=dict(mesh.shape),
        kernels=[],
        matmul_flops_per_second={},
        memory_bytes_per_second={},
        collectives={},
        host_link_bytes_per_second=None,
        dispatch_seconds=None,
        steps={},
        verdict=[],
    )


def _kernels(on_phase: OnPhase) -> list[kernels.KernelResult]:
    """The results of every process's first device, and of each kernel the worst of them."""
    platform = jax.devices()[0].platform
    results = kernels.check_kernels(platform, lambda name: on_phase(f"checking {name}"))
    if distributed.process_count() == 1:
        return results
    wrong = np.array([result.is_wrong for result in results], np.int32)
    wrong_PK = np.asarray(multihost_utils.process_allgather(wrong)).reshape(-1, len(results))
    return [
        dataclasses.replace(
            result, errors={}, problem=f"wrong in process {int(np.argmax(wrong_P))}"
        )
        if wrong_P.any() and not result.is_wrong
        else result
        for result, wrong_P in zip(results, wrong_PK.T, strict=True)
    ]


def _rates(devices: Devices, on_phase: OnPhase) -> dict[str, Any]:
    """The fields of a Calibration that are rates."""
    on_phase("measuring products")
    matmul = _listed(rates.matmul_rates(devices))
    on_phase("measuring memory")
    memory = _listed(rates.memory_rates(devices))
    on_phase("measuring the way to the host")
    link, dispatch = rates.host_link_rates(devices), rates.dispatch_seconds(devices.clock)
    on_phase("measuring collectives")
    return {
        "matmul_flops_per_second": matmul,
        "memory_bytes_per_second": memory,
        "host_link_bytes_per_second": link and _listed(link),
        "dispatch_seconds": dispatch._asdict(),
        "collectives": {
            axis: _axis(devices.mesh, axis, by_kind)
            for axis, by_kind in collectives.collective_rates(devices).items()
        },
    }


def _axis(mesh: Mesh, axis: str, by_kind: dict[str, Timing]) -> dict[str, Any]:
    """An axis's wiring and rates, and those that are planned where any are published."""
    slice_ = slice_of(list(mesh.devices.flat))
    wires = wiring(mesh, axis, slice_)
    kind = mesh.devices.flat[0].device_kind
    planned = {}
    if (generation := generation_of(kind)) and (chip := chip_of(kind)):
        published = published_rates(generation)
        seconds = {k: transfer_seconds(published, wires, k, chip.devices) for k in by_kind}
        planned = {k: 1 / s for k, s in seconds.items() if s}
    listed = {"wiring": wires, "bytes_per_second": _listed(by_kind)}
    return listed | {"planned_bytes_per_second": planned}


def _step(
    preset: str, config: RunConfig, mesh: Mesh, calibration: Calibration, clock, on_phase: OnPhase
) -> dict[str, Any]:
    """A step's time beside its plan by the rates just measured."""
    plan = CompiledStep(config, mesh, on_phase).plan(calibration.rates(config))
    on_phase(f"timing the {config.plan.program} step")
    measured = time_step(make_step(config, mesh), clock)
    planned = plan.step_seconds()
    rows, tokens = plan.batch
    return {
        "config": f"{preset}, {rows} x {tokens} tokens",
        "seconds": measured._asdict(),
        "planned_seconds": planned,
        "counted": plan.measured.get("counted", "of the compiled program"),
        "ratio": measured.median / planned["scheduled"],
    }


def _listed(by_name: dict[str, Timing]) -> dict[str, dict[str, float]]:
    return {
        name: timing._asdict() for name, timing in by_name.items() if math.isfinite(timing.best)
    }
