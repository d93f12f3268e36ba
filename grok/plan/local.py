"""A plan of a step on the devices that are here: compiled for them, not for a slice by its name."""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from grok import sharding
from grok.config import RunConfig
from grok.config.mesh import batch_shards
from grok.errors import ConfigError
from grok.hardware import CHIPS, Chip, chip_of, configure_devices, generation_of
from grok.model.mesh_fit import check_plan_fits
from grok.ops.moe.tiling import training_tile_rows
from grok.plan.calibration import Calibration, with_ratio
from grok.plan.compile_process import cache_loop_count, costs, memory, walk
from grok.plan.estimate import Plan, Price, batch_of, make_plan, model_flops
from grok.plan.program_cost import CompiledProgram
from grok.plan.programs import bytes_per_device, make_program
from grok.plan.rates import Rates
from grok.plan.topology import Slice


@dataclasses.dataclass(frozen=True)
class LocalDevices(Slice):
    """Devices that are no TPUs, and so wired in no grid; `generation` is their kind."""

    memory: int = 0  # bytes of a device

    @property
    def name(self) -> str:
        """Number and kind."""
        return f"{self.num_chips} x {self.generation}"

    @property
    def chip(self) -> Chip:
        """Memory alone is known; rates are measured."""
        return Chip(0.0, self.memory, 0.0, 1, (self.generation,), 0.0, 1, 1, 0.0, 0, {})


def slice_of(devices: Sequence[jax.Device]) -> Slice:
    """The slice that these devices are, all of a kind."""
    kind = devices[0].device_kind
    if (chip := chip_of(kind)) is None:
        return LocalDevices(kind, (len(devices),), memory=_device_bytes(devices))
    slices = {getattr(device, "slice_index", 0) for device in devices}
    coords: Any = [device.coords for device in devices]
    shape = np.max(np.array(coords), axis=0)[: chip.dimensions] + 1
    generation = generation_of(kind)
    assert generation is not None
    return Slice(generation, tuple(map(int, shape)), len(slices))


def _device_bytes(devices: Sequence[jax.Device]) -> int:
    """Bytes of a device's memory; simulated ones share the machine's."""
    local = [device for device in devices if device.process_index == jax.process_index()]
    stats = local[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(local)


def plan_calibrated(
    config: RunConfig,
    calibration: Calibration,
    price: Price | None,
    on_phase: Callable[[str], None],
) -> Plan:
    """The plan of `config.plan.program` on all devices here, by the rates of a calibration of such
    devices; CPUs are simulated as they were then."""
    is_cpu = calibration.device["platform"] == "cpu"
    configure_devices(calibration.device["count"] if is_cpu else 0)
    devices = jax.devices()
    calibration.check_devices(devices[0].device_kind, len(devices))
    sizes = check_plan_fits(config, len(devices))
    mesh = sharding.make_mesh(**sizes, devices=devices)
    rates = calibration.rates(config)
    return with_ratio(CompiledStep(config, mesh, on_phase).plan(rates, price), calibration)


def _memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """As `memory`; the peak that CPUs state is without temporaries."""
    stats = compiled.memory_analysis()
    assert stats is not None
    measured = memory(compiled)
    with_temporaries = measured["state"] + stats.temp_size_in_bytes
    is_stated = measured["peak"] > measured["state"]
    return measured if is_stated else measured | {"peak": with_temporaries}


def open_loop_count(config: RunConfig, mesh: Mesh) -> float:
    """Iterations of the loops whose count a program leaves open: over the KV cache, or in training
    without kernels over the tiles of an expert's rows, of which an even load fills so many."""
    if config.plan.program != "train" or config.model.moe is None:
        return cache_loop_count(config)
    rows, length = batch_of(config)
    tokens = rows * length // (batch_shards(dict(mesh.shape)) * config.train.grad_accum_steps)
    C, E = config.model.moe.num_selected, config.model.moe.num_experts
    return max(1.0, tokens * C / E / training_tile_rows(tokens, C, E)[0])


class CompiledStep:
    """The step of `config.plan.program`, compiled for the devices of a mesh."""

    def __init__(
        self, config: RunConfig, mesh: Mesh, on_phase: Callable[[str], None] = lambda phase: None
    ):
        """Compiles it; ConfigError where the compiler refuses it."""
        self._config, self._mesh = config, mesh
        self._slice = slice_of(list(mesh.devices.flat))
        on_phase(f"compiling the {config.plan.program} step for {self._slice}")
        with jax.set_mesh(mesh):
            program = make_program(config, mesh)
            arguments = bytes_per_device(program.arguments)
            start = time.monotonic()
            try:
                compiled = program.jitted.lower(*program.arguments.values()).compile()
            except jax.errors.JaxRuntimeError as error:
                message = " ".join(str(error).split())
                problem = f"the step does not compile for {self._slice}"
                raise ConfigError(f"{problem}: {message}") from None
        text = compiled.as_text()
        assert text is not None
        self._program = CompiledProgram(text, dict(mesh.shape), open_loop_count(config, mesh))
        self._measured: dict[str, Any] = {
            "mesh_sizes": dict(mesh.shape),
            "devices_per_chip": mesh.size // self._slice.num_chips,
            "largest_state": sorted(arguments.items(), key=lambda item: -item[1])[:3],
            "compile_seconds": time.monotonic() - start,
            **_memory(compiled),
            **costs(self._program, mesh, self._slice),
        }

    def plan(self, rates: Rates, price: Price | None = None) -> Plan:
        """Its plan by these rates.

        Where the program's text hides products, as a GPU's does those of libraries and a CPU's
        those of a decode step in loops of unknown length, the FLOPs are the model's, and the bytes
        those of the state, read once.
        """
        measured, per_chip = dict(self._measured), self._measured["devices_per_chip"]
        measured["schedule"] = walk(self._program, rates, measured["wiring"], per_chip)
        flops = model_flops(self._config) / self._mesh.size
        in_loops = self._config.plan.program != "train" and measured["loops"]
        is_tpu = self._slice.generation in CHIPS
        if not is_tpu and (measured["flops"] < flops or in_loops):
            hbm = float(measured["state"])
            seconds = (flops / rates.flops + hbm / rates.hbm) * per_chip
            measured |= {"flops": flops, "flops_8bit": 0.0, "hbm": hbm, "counted": "of the model"}
            measured["schedule"] |= {"seconds": seconds}
        plan = make_plan(self._config, self._slice, rates, measured, price)
        # A TPU's compiler refuses what does not fit; those of other devices do not.
        total = measured["peak"] * per_chip
        return dataclasses.replace(plan, fits=is_tpu or total <= self._slice.chip.hbm)
