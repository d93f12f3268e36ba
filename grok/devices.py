"""Which devices JAX shows to a command; decided before its backend starts."""

import ctypes
import importlib.util
import os
from pathlib import Path

import jax

# Options of mallopt(3): buffers mapped by themselves, free memory that is kept, and heaps.
_MMAP_MAX, _TRIM_THRESHOLD, _ARENA_MAX = -4, -1, -8


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
    if jax.config.jax_platforms == "cpu":
        _keep_freed_memory()
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "grok" / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1)


def _keep_freed_memory() -> None:
    """Tells glibc, where it is the C library, to keep freed memory for what comes next.

    By default it gives large buffers back to the system, and each step of XLA on CPU has all of its
    memory zeroed anew, page by page: a sixth of a training step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1)):
            mallopt(option, value)


def has_tpu() -> bool:
    """Whether this machine shows a TPU: v2 to v4 as /dev/accel*, later ones through VFIO."""
    devices = Path("/dev")
    return any(devices.glob("accel[0-9]*")) or any(devices.glob("vfio/[0-9]*"))
