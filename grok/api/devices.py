"""JAX's devices, chosen as the commands choose them, in a process that may use JAX already."""

import jax

from grok import hardware
from grok.errors import ConfigError


def prepare_devices(simulated: int) -> None:
    """Simulates `simulated` CPU devices (0: takes the real ones), and keeps compiled programs in
    the user's cache unless JAX keeps them elsewhere. Raises ConfigError where JAX has started with
    another number of devices."""
    try:
        hardware.choose_platform(simulated)
    except RuntimeError:
        if (count := jax.device_count()) != simulated:
            problem = f"mesh.simulated_devices={simulated} comes too late: JAX runs on {count} here"
            right = f"a new process, or mesh.simulated_devices=0 on a mesh of {count}, would work"
            raise ConfigError(f"{problem}; {right}.") from None
    if jax.config.jax_compilation_cache_dir is None:
        hardware.keep_programs()
