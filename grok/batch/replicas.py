"""Which hosts hold a whole model together, and which part of a job is theirs."""

import contextlib
import dataclasses
from collections.abc import Iterator

from grok import distributed
from grok.config.batch import BatchConfig
from grok.hardware import configure_devices, has_tpu


@dataclasses.dataclass(frozen=True)
class Replica:
    """A model on the devices of one host or of all: the `number`-th of `count`.

    `writes`: this process writes and speaks for its replica. `spans_all_hosts`: the mesh spans all
    hosts, which then make the same calls in the same order.
    """

    number: int
    count: int
    writes: bool
    spans_all_hosts: bool


@contextlib.contextmanager
def starting(config: BatchConfig) -> Iterator[Replica]:
    """The replica that this process is of.

    Replicas of one host each need nothing of each other: they do not connect, and one that fails
    leaves the others to their shares. Only hosts of one TPU slice start and end together, as its
    runtime wants it, and so do hosts that a mesh spans.
    """
    place = distributed.env_cluster()
    if config.replica == "host" and (place or not has_tpu()):
        configure_devices(config.mesh.simulated_devices)
        _, count, number = place or ("", 1, 0)
        yield Replica(number, count, True, False)
        return
    with distributed.exit_together():
        distributed.initialize(config)
        spans_all_hosts = config.replica == "all"
        configure_devices(
            config.mesh.simulated_devices // (distributed.process_count() if spans_all_hosts else 1)
        )
        if spans_all_hosts:
            yield Replica(0, 1, distributed.is_primary(), distributed.process_count() > 1)
        else:
            yield Replica(distributed.process_index(), distributed.process_count(), True, False)
        distributed.barrier()
