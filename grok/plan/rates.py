"""Rates of a chip, from which a plan's times are computed; all that is assumed of the hardware's
speed is here, so that measured rates can take the place of the published ones."""

import dataclasses
from collections import defaultdict
from typing import Any

from grok.hardware import CHIPS
from grok.plan.program_cost import Cost


@dataclasses.dataclass(frozen=True)
class Rates:
    """Rates of one chip."""

    flops: float  # matrix products in bfloat16, FLOP/s
    hbm: float  # bytes/s
    link: float  # one wire to a neighbouring chip, one way, bytes/s
    network: float  # its share of its host's way to other slices, bytes/s
    source: str  # of the figures, for people


def published_rates(generation: str) -> Rates:
    """The rates of a generation of `CHIPS` that its maker publishes."""
    chip = CHIPS[generation]
    return Rates(chip.flops, chip.bandwidth, chip.link, chip.network, "specifications")


def transfer_seconds(rates: Rates, wiring: dict[str, Any], kind: str, sent: float) -> float:
    """Time to send so many bytes from each chip, over all links that it has along the axes, or over
    the network between slices; in an all-to-all each byte takes all hops to its target."""
    if wiring["slices"]:
        return sent / rates.network
    if not wiring["links"]:  # two devices of one chip
        return 0.0
    hops = max(1.0, wiring["hops"]) if "all-to-all" in kind else 1.0
    links = 1 if kind == "collective-permute" else wiring["links"]
    return sent * hops / (links * rates.link)


def resource_seconds(
    cost: Cost, rates: Rates, wiring: dict[str, dict[str, Any]], per_chip: int
) -> dict[str, float]:
    """Time that a cost of each of `per_chip` devices of a chip takes of its resources. `wiring`: of
    the mesh axes that collectives use."""
    use: dict[str, float] = defaultdict(float)
    use["compute"] = cost.flops * per_chip / rates.flops
    use["hbm"] = cost.hbm * per_chip / rates.hbm
    for (axes, kind), sent in cost.collectives.items():
        if axes != "none":
            medium = "network" if wiring[axes]["slices"] else "interconnect"
            use[medium] += transfer_seconds(rates, wiring[axes], kind, sent * per_chip)
    return use
