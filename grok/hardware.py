"""TPU generations, by Google's published specifications, the seventh's partly by the press; the
choice of the devices that JAX uses, and facts of those that a program is traced for."""

import importlib.util
import os
import platform as python_platform
from pathlib import Path
from typing import NamedTuple


class Chip(NamedTuple):
    """Specifications of one chip."""

    flops: float  # peak of bfloat16 products, FLOP/s
    hbm: int  # memory, bytes
    bandwidth: float  # of that memory, bytes/s
    devices: int  # JAX devices that it is, each with an equal share of the rest
    kinds: tuple[str, ...]  # what JAX calls them
    link: float  # one wire to a neighbouring chip, one way, bytes/s
    dimensions: int  # of the grid that chips are wired in
    ring: int  # a side of the grid whose length is a multiple of this closes to a ring
    network: float  # a chip's share of its host's way to other slices, bytes/s
    vmem: int  # vector memory of a core, bytes
    # Peak of products in 8 bits, by type, OP/s; only of those faster than bfloat16.
    flops_8bit: dict[str, float]


GIB, MIB = 2**30, 2**20
LANES = 128  # elements of a TPU's vector register along the last axis of an array

_V5E, _V5P, _V6E = ("TPU v5 lite", "TPU v5e"), ("TPU v5", "TPU v5p"), ("TPU v6 lite", "TPU v6e")

# The published rates of int8 on v5e, v5p and v6e, and of float8 on the seventh, are twice those of
# bfloat16; of int8 on the seventh and of float8 on the others nothing is published.
CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1200e9, 1, ("TPU v4",), 45e9, 3, 4, 6.25e9, 16 * MIB, {}),
    "v5e": Chip(
        197e12, 16 * GIB, 810e9, 1, _V5E, 45e9, 2, 16, 3.125e9, 128 * MIB, {"int8": 393e12}
    ),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 1, _V5P, 90e9, 3, 4, 6.25e9, 64 * MIB, {"int8": 918e12}),
    "v6e": Chip(
        918e12, 32 * GIB, 1638e9, 1, _V6E, 90e9, 2, 16, 12.5e9, 128 * MIB, {"int8": 1836e12}
    ),
    "7x": Chip(
        2307e12,
        192 * GIB,
        7300e9,
        2,
        ("TPU7x",),
        100e9,
        3,
        4,
        12.5e9,
        64 * MIB,
        {"float8": 4614e12},
    ),
}


def generation_of(device_kind: str) -> str | None:
    """The generation of JAX devices of this `device_kind`; None where it is not known."""
    return next((name for name, chip in CHIPS.items() if device_kind in chip.kinds), None)


def chip_of(device_kind: str) -> Chip | None:
    """The chip of JAX devices of this `device_kind`; None where it is not known."""
    generation = generation_of(device_kind)
    return None if generation is None else CHIPS[generation]


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of one JAX device of this `device_kind`; None where it is not known."""
    chip = chip_of(device_kind)
    return chip and chip.flops / chip.devices


def platform() -> str:
    """The platform that is traced for, "cpu" or "tpu": the ambient mesh's, else this machine's."""
    import jax

    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """The kind of the devices that are traced for, such as "TPU v6 lite"."""
    import jax

    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def vmem_bytes() -> int:
    """Vector memory of a core of the devices that are traced for; of unknown ones, 64 MiB."""
    chip = chip_of(device_kind())
    return 64 * MIB if chip is None else chip.vmem


def has_large_vmem() -> bool:
    """True if that is at least 128 MiB."""
    return vmem_bytes() >= 128 * MIB


def has_small_vmem() -> bool:
    """True if that is 16 MiB, as of a v4."""
    return vmem_bytes() <= 16 * MIB


def has_little_hbm() -> bool:
    """True if one of the devices that are traced for has at most 32 GiB of HBM."""
    chip = chip_of(device_kind())
    return chip is not None and chip.hbm / chip.devices <= 32 * GIB


def configure_devices(simulated: int) -> None:
    """Simulates `simulated` CPU devices (0: uses the real ones), and keeps compiled programs in the
    user's cache folder. Call it before JAX's backend starts."""
    choose_platform(simulated)
    keep_programs()


def choose_platform(simulated: int) -> None:
    """Simulates `simulated` CPU devices; 0: uses the real ones. RuntimeError where the number can
    no longer change, as JAX's backend has started."""
    import jax

    if simulated:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", simulated)
    elif not jax.config.jax_platforms and not has_tpu():
        # Where libtpu is installed to compile for TPUs, JAX would search seconds for one, and
        # complain, before it took what the machine has.
        cuda = any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
        jax.config.update("jax_platforms", "cuda,cpu" if cuda else "cpu")


def keep_programs() -> None:
    """Keeps compiled programs in the user's cache folder."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(user_cache()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1)


def user_cache() -> Path:
    """The user's folder of compiled programs on this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "grok" / "compiled"


def processor() -> bytes:
    """This machine's processor: its kind and instructions, where Linux lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().split(b"\n\n")[0].splitlines()
    except OSError:
        return python_platform.processor().encode()
    names = (b"model name", b"flags", b"Features", b"CPU part")
    return b"\n".join(line for line in lines if line.startswith(names))


def num_cores() -> int | None:
    """Cores that this process may use; where the system does not say that, those of the machine."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def is_one_of_several() -> bool:
    """True where this process may be one of several of a job: the environment numbers it, or it is
    on a TPU, which may be part of a slice."""
    return bool(os.environ.get("GROK_NUM_PROCESSES")) or has_tpu()


def has_tpu() -> bool:
    """True if this machine shows a TPU: v2 to v4 as /dev/accel*, later ones through VFIO."""
    devices = Path("/dev")
    return any(devices.glob("accel[0-9]*")) or any(devices.glob("vfio/[0-9]*"))
