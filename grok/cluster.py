"""The processes of a run: coordinator address, process count and process index, by the environment
or by the metadata of a TPU VM."""

import os

# JAX has no public name for what finds the cluster of a TPU VM.
from jax._src.clusters import ClusterEnv

from grok.errors import ConfigError, Lost
from grok.hardware import has_tpu

CLUSTER_VARIABLES = ("GROK_COORDINATOR", "GROK_NUM_PROCESSES", "GROK_PROCESS_ID")
# JAX's own names for the same, which it would read where it makes the connection.
JAX_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
INITIALIZE_TIMEOUT_SECONDS = 300


def env_cluster() -> tuple[str, int, int] | None:
    """Coordinator address, process count and process index from the environment, or None. Raises
    ConfigError where the variables are incomplete or make no sense."""
    values = [os.environ.get(name, "") for name in CLUSTER_VARIABLES]
    if not any(values):
        if other := next((name for name in JAX_VARIABLES if os.environ.get(name)), None):
            raise ConfigError(
                f"the environment has {other}, which is not read here; "
                f"{', '.join(CLUSTER_VARIABLES)} in place of JAX's names would work."
            )
        return None
    address, count, index = values
    if not all(values):
        missing = ", ".join(name for name in CLUSTER_VARIABLES if not os.environ.get(name))
        raise ConfigError(
            f"the environment has only some of {', '.join(CLUSTER_VARIABLES)}; with {missing} as "
            "well, or with none of them, it would work."
        )
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise ConfigError(
            f"GROK_NUM_PROCESSES={count} and GROK_PROCESS_ID={index} are no number of processes "
            "and one of them counted from 0; 2 and 0, and 2 and 1 on the other host, would work."
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"GROK_COORDINATOR={address} is no address; 10.0.0.1:8476 would work.")
    return address, int(count), int(index)


def tpu_cluster() -> tuple[str, int, int] | None:
    """The same from the environment of a TPU; None where that is of no cluster."""
    if not has_tpu():
        return None
    try:
        address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
            *(None,) * 5, INITIALIZE_TIMEOUT_SECONDS
        )
    except RuntimeError as error:
        raise Lost(f"the other hosts of this TPU cannot be found: {error}") from error
    return None if address is None or count is None or index is None else (address, count, index)
