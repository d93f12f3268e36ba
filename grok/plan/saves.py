"""Checkpoints of a planned training run: how long saves and restores take at a stated bandwidth of
the storage, and what a preemption costs in expectation."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from grok.plan.estimate import Plan

# Bytes/s between a host and its storage, each way. Assumed in November 2026; not measured on a TPU.
# gcsfuse's own benchmarks of one VM with 100 Gbit/s reach 7.7 GiB/s reading and 2.6 to 4.4 writing.
STORAGE_BANDWIDTH = 1e9
STORAGE_SOURCE = "assumed in November 2026"
# From a preemption to the restore on the next slice, without the wait for one: set-up of the hosts,
# start of the processes, tracing. Assumed likewise.
RESTART_SECONDS = 300.0


@dataclasses.dataclass(frozen=True)
class Saves:
    """Checkpoints of a run, on average."""

    size: int  # bytes of a checkpoint
    hosts: int
    bandwidth: float  # bytes/s of one host, each way
    source: str  # of the bandwidth
    step: float  # seconds: calibrated if a calibration has such a step, else scheduled
    every: int  # checkpoint.every; 0: as soon as the last one is saved

    @property
    def seconds(self) -> float:
        """Seconds of a save, beside the steps, and of a restore: hosts share the bytes equally."""
        return self.size / self.hosts / self.bandwidth

    @property
    def interval(self) -> float:
        """Seconds from one save to the next."""
        return max(self.every * self.step, self.seconds, self.step)

    @property
    def lost(self) -> float:
        """Seconds of work since the last checkpoint that was complete when a preemption comes: half
        an interval, and the time of the save, which is of no use before it is complete."""
        return self.interval / 2 + self.seconds

    @property
    def preemption(self) -> float:
        """Seconds that a preemption costs: lost work, the restart and the restore."""
        return self.lost + RESTART_SECONDS + self.seconds

    def to_dict(self) -> dict[str, Any]:
        """The figures, as in the object of `grok plan --json`."""
        return {
            "bytes": self.size,
            "storage_bytes_per_second_per_host": self.bandwidth,
            "save_seconds": self.seconds,
            "restore_seconds": self.seconds,
            "interval_seconds": self.interval,
            "preemption_seconds": self.preemption,
        }


def saves_of(plan: Plan, bandwidth: float | None = None) -> Saves | None:
    """Checkpoints of a plan of training that fits; None of any other. bandwidth: bytes/s between a
    host and its storage; None: STORAGE_BANDWIDTH."""
    if plan.config.plan.program != "train" or not plan.fits:
        return None
    source = STORAGE_SOURCE if bandwidth is None else "--storage-bandwidth"
    size, every = plan.measured["checkpoint"], plan.config.checkpoint.every
    seconds = plan.step_seconds()
    step = seconds.get("calibrated", seconds["scheduled"])
    return Saves(size, num_hosts(plan), bandwidth or STORAGE_BANDWIDTH, source, step, every)


def num_hosts(plan: Plan) -> int:
    """Hosts of the slices: four chips each, or all of one with eight."""
    chips = plan.slice.num_chips // plan.slice.count
    alone = plan.slice.generation in ("v5e", "v6e") and chips <= 8
    return plan.slice.count * (1 if alone else max(1, chips // 4))


def describe_saves(saves: Saves, usd_per_hour: float | None) -> Iterator[str]:
    """Lines of a plan: a save and a restore, then a preemption. usd_per_hour: of all chips."""
    often = f"every {saves.every:,} steps" if saves.every else "as soon as the last one is saved"
    text = f"{saves.size / 1e9:,.4g} GB, saved beside the steps, or restored, in "
    text += f"{saves.seconds:,.3g} s by {saves.hosts} host{'s' * (saves.hosts > 1)} at "
    yield f"{text}{saves.bandwidth / 1e9:g} GB/s each ({saves.source})"
    yield f"{often}: {saves.interval:,.4g} s apart"
    if saves.every * saves.step < saves.seconds and saves.every:
        yield "saves take longer than the steps between them, so that steps wait for them"
    text = f"a preemption costs {saves.preemption:,.4g} s on average: {saves.lost:,.4g} s of work, "
    text += f"{RESTART_SECONDS:g} s to start (assumed; without the wait for a slice), "
    text += f"{saves.seconds:,.3g} s to restore"
    if usd_per_hour is not None:
        text += f"; {saves.preemption / 3600 * usd_per_hour:,.4g} USD"
    yield text
