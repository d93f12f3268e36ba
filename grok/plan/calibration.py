"""The file that `grok calibrate` writes, and the rates that a plan takes from it."""

import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any

from grok import storage
from grok.config import RunConfig
from grok.errors import ConfigError
from grok.hardware import CHIPS, chip_of, generation_of
from grok.plan.estimate import Plan
from grok.plan.rates import Rates, published_rates, transfer_seconds
from grok.plan.topology import Slice

VERSION = 1
UNIT = Rates(1.0, 1.0, 1.0, 1.0, 1.0, "")  # rates at which times are amounts


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Measurements of some devices; rates are each one's while all work. A measurement is an object
    with `median` and `best`."""

    version: int
    date: str  # UTC
    code: dict[str, str]  # versions
    device: dict[str, Any]  # kind, platform, count, processes, cores
    clock: str  # of the seconds: wall, or cpu: of the process, which other programs do not disturb
    mesh: dict[str, int]
    kernels: list[dict[str, Any]]
    matmul_flops_per_second: dict[str, dict[str, float]]  # by type
    memory_bytes_per_second: dict[str, dict[str, float]]  # read, copy
    # By mesh axis: its wiring, and bytes/s that a device sends by kind of collective.
    collectives: dict[str, dict[str, Any]]
    host_link_bytes_per_second: dict[str, dict[str, float]] | None
    dispatch_seconds: dict[str, float] | None
    steps: dict[str, dict[str, Any]]  # train and decode: measured, planned, and their ratio
    verdict: list[str]
    file: str = ""  # that it was read from

    @property
    def name(self) -> str:
        """The file, its date, and what was measured, in words."""
        devices = f"{self.device['count']} x {self.device['kind']}"
        seconds = ", in seconds of CPU time" if self.clock == "cpu" else ""
        return f"{self.file} of {self.date}, measured on {devices}{seconds}"

    @property
    def is_tpu(self) -> bool:
        """True if it is of a generation of TPUs that a slice can be planned of."""
        return chip_of(self.device["kind"]) is not None

    def check_slice(self, slice_: Slice) -> None:
        """Refuses, as ConfigError, a slice of another kind of chip."""
        if generation_of(self.device["kind"]) != slice_.generation:
            kinds = CHIPS[slice_.generation].kinds[0]
            problem = f"{self.file} was measured on {self.device['kind']}, and {slice_} has {kinds}"
            raise ConfigError(f"{problem}; a file measured on {kinds}, or none, would work.")

    def check_devices(self, kind: str, count: int) -> None:
        """Refuses, as ConfigError, to plan for devices here that are others than those measured."""
        measured = self.device["kind"], self.device["count"]
        if (kind, count) != measured:
            problem = f"{self.file} was measured on {measured[1]} x {measured[0]}, and here are"
            fix = "`grok calibrate` here would write one that works"
            raise ConfigError(f"{problem} {count} x {kind}; {fix}.")

    def rates(self, config: RunConfig) -> Rates:
        """The rates of a chip for a program of `config`: products in its type, memory as its
        program uses it."""
        chip = chip_of(self.device["kind"])
        per_chip = 1 if chip is None else chip.devices
        dtype = config.model.compute_dtype
        if dtype not in self.matmul_flops_per_second or not self.memory_bytes_per_second:
            problem = f"{self.file} has no rate of products in {dtype} or none of memory"
            raise ConfigError(f"{problem}; `grok calibrate` without --only writes all rates.")
        use = "copy" if config.plan.program == "train" else "read"
        by_kind, network = self._wires(per_chip)
        generation = generation_of(self.device["kind"])
        published = None if generation is None else published_rates(generation)
        return Rates(
            flops=per_chip * self.matmul_flops_per_second[dtype]["median"],
            hbm=per_chip * self.memory_bytes_per_second[use]["median"],
            link=statistics.median(by_kind.values()) if by_kind else _or(published, "link"),
            network=network or _or(published, "network"),
            host=self._host_rate(per_chip) or _or(published, "host"),
            source=f"measured: {self.name}{_published_rest(published, by_kind, network)}",
            dtype=dtype,
            by_kind=by_kind,
            flops_8bit=None if published is None else published.flops_8bit,
        )

    def _wires(self, per_chip: int) -> tuple[dict[str, float], float | None]:
        """Bytes/s of a wire by kind of collective, and of the network between slices; the median
        over the axes measured."""
        wires: dict[str, list[float]] = {}
        network: list[float] = []
        for axis in self.collectives.values():
            for kind, rate in axis["bytes_per_second"].items():
                sent = rate["median"] * per_chip  # in a second
                if axis["wiring"]["slices"]:
                    network.append(sent)
                elif (seconds := transfer_seconds(UNIT, axis["wiring"], kind, 1)) > 0:
                    wires.setdefault(kind, []).append(sent * seconds)
        by_kind = {kind: statistics.median(rates) for kind, rates in wires.items()}
        return by_kind, statistics.median(network) if network else None

    def _host_rate(self, per_chip: int) -> float | None:
        if (link := self.host_link_bytes_per_second) is None:
            return None
        return per_chip * min(rate["median"] for rate in link.values())


def with_ratio(plan: Plan, calibration: Calibration) -> Plan:
    """The plan, and beside it what the calibration's own step of this program, if it has one, took
    over its own plan by the same rates."""
    step = calibration.steps.get(plan.config.plan.program)
    if step is None:
        return plan
    words = (
        f"the calibration's own step took x {step['ratio']:.3g} its schedule, of {step['config']}"
    )
    return dataclasses.replace(plan, ratio=step["ratio"], ratio_source=words)


def _or(published: Rates | None, name: str) -> float:
    """A published rate in place of one that was not measured; none limits what is not there."""
    return math.inf if published is None else getattr(published, name)


def _published_rest(published: Rates | None, by_kind, network) -> str:
    missing = [
        name for name, is_there in (("links", by_kind), ("network", network)) if not is_there
    ]
    if published is None or not missing:
        return ""
    return f"; {' and '.join(missing)} were not, and are as published: {published.source}"


def read_calibration(path: str | Path) -> Calibration:
    """The calibration in a file, here or at gs://; ConfigError if it is none."""
    fields = {field.name for field in dataclasses.fields(Calibration)} - {"file"}
    try:
        content = json.loads(storage.read_bytes(str(path), ConfigError))
    except ConfigError as error:
        raise ConfigError(f"{error} `grok calibrate --out {path}` writes such a file.") from None
    except ValueError:
        raise ConfigError(f"{path} is not JSON, and so no file of `grok calibrate`.") from None
    if not isinstance(content, dict) or set(content) != fields or content["version"] != VERSION:
        problem = f"{path} is no file that this version of `grok calibrate` wrote"
        raise ConfigError(f"{problem}; `grok calibrate --out {path}` writes one.")
    return Calibration(**content, file=str(path))


def check_writable(path: str) -> None:
    """Refuses, as ConfigError, a file that cannot be written, before what it is for is measured."""
    probe = f"{path}.probe"
    try:
        storage.write_bytes(probe, b"")
        storage.remove(probe)
    except OSError as error:
        problem = f"--out {path} cannot be written: {storage.reason(error)}"
        raise ConfigError(f"{problem}; --out calibration.json would work.") from None


def write_calibration(calibration: Calibration, path: str | Path) -> None:
    """Writes the file, here or at gs://."""
    content = dataclasses.asdict(calibration)
    del content["file"]
    storage.write_bytes(str(path), (json.dumps(content, indent=2) + "\n").encode())
