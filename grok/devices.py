"""Which devices JAX shows to a command; decided before its backend starts."""

import importlib.util
import os
from pathlib import Path

import jax


def prepare(simulated: int) -> None:
    """Simulates `simulated` CPU devices in this process (0: takes the machine's real ones), and
    keeps compiled programs between runs in the user's cache folder."""
    if simulated:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", simulated)
    elif not jax.config.jax_platforms and not has_tpu():
        # Where libtpu is installed to compile for TPUs, JAX would search seconds for one, and
        # complain, before it took what the machine has.
        cuda = any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
        jax.config.update("jax_platforms", "cuda,cpu" if cuda else "cpu")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "grok" / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1)


def has_tpu() -> bool:
    """Whether this machine shows a TPU: v2 to v4 as /dev/accel*, later ones through VFIO."""
    devices = Path("/dev")
    return any(devices.glob("accel[0-9]*")) or any(devices.glob("vfio/[0-9]*"))
