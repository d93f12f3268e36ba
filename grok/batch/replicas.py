"""Replicas of the model in a batch job: the hosts of each, and its share of the shards."""

import contextlib
import dataclasses
from collections.abc import Iterator

from grok import distributed
from grok.config.infer import BatchConfig
from grok.hardware import configure_devices, has_tpu


@dataclasses.dataclass(frozen=True)
class Replica:
    """A model on the devices of one host or of all: number `index` of `count`.

    `writes`: this process writes and prints for its replica. `spans_all_hosts`: the mesh spans all
    hosts, which then make the same calls in the same order.
    """

    index: int
    count: int
    writes: bool
    spans_all_hosts: bool


@contextlib.contextmanager
def join_replica(config: BatchConfig) -> Iterator[Replica]:
    """Gives the replica of this process.

    Replicas of one host each are independent: they do not connect, and one that fails leaves the
    others to their shares. Hosts of one TPU slice start and end together, as its runtime demands,
    and so do hosts that one mesh spans.
    """
    cluster = distributed.env_cluster()
    if config.replica == "host" and (cluster or not has_tpu()):
        configure_devices(config.mesh.simulated_devices)
        _, count, index = cluster or ("", 1, 0)
        yield Replica(index, count, True, False)
        return
    with distributed.exit_together():
        distributed.initialize(config)
        count = distributed.process_count()
        if config.replica == "all":
            configure_devices(config.mesh.simulated_devices // count)
            yield Replica(0, 1, distributed.is_primary(), count > 1)
        else:
            configure_devices(config.mesh.simulated_devices)
            yield Replica(distributed.process_index(), count, True, False)
        distributed.barrier()
