"""Rates of a chip, from which a plan's times are computed, and the times themselves; all that is
assumed of the hardware's speed is here, so that measured rates can take the place of these."""

import dataclasses
from collections import defaultdict
from typing import Any, NamedTuple

from grok.hardware import CHIPS
from grok.plan.program_cost import Cost


@dataclasses.dataclass(frozen=True)
class Rates:
    """Rates of one chip."""

    flops: float  # matrix products, FLOP/s
    hbm: float  # bytes/s
    link: float  # one wire to a neighbouring chip, one way, bytes/s
    network: float  # its share of its host's way to other slices, bytes/s
    host: float  # to or from host memory, bytes/s
    source: str  # of the figures, for people
    dtype: str = "bfloat16"  # of the products
    # Of a wire, by kind of collective, where that was measured; `link` holds for the others.
    by_kind: dict[str, float] = dataclasses.field(default_factory=dict)
    flops_8bit: float | None = None  # products of 8-bit values, OP/s; None: not faster

    def compute_seconds(self, flops: float, flops_8bit: float) -> float:
        """Time of products of so many FLOPs, `flops_8bit` of them of 8-bit values."""
        rate = self.flops_8bit or self.flops
        return (flops - flops_8bit) / self.flops + flops_8bit / rate


class Wires(NamedTuple):
    """Rates that collectives and copies reach, bytes/s of a chip."""

    link: float
    network: float
    host: float
    source: str


# Published measurements, collected in November 2026.
# Links: v6e, psum over 256 chips, 235.8 GB/s on four (AI-Hypercomputer/tpu-recipes, trillium
# microbenchmarks); TPU7x, all-gather over 2x2x1, 178.8 GB/s on two (AI-Hypercomputer/
# accelerator-microbenchmarks, Ironwood); v5e, all-gather over a ring of 16, 95% of 45 GB/s (JAX,
# "How to scale your model", part 3), a share that is taken for v4 and v5p: none was found of them.
# Network: v6e, psum over two slices, 4.11 of 12.5 GB/s (the same recipes), a share that is taken
# for all. Host memory: the same book, part 2.
_BOOK = (
    "links 95% of the specification, as measured on v5e, and host memory: How to scale your model; "
    "network a third of it, as measured on v6e"
)
_RECIPES = (
    "links and network as a psum reaches them: tpu-recipes; host memory: How to scale your model"
)
WIRES = {
    "v4": Wires(42.75e9, 2.06e9, 15e9, _BOOK),
    "v5e": Wires(42.75e9, 1.03e9, 15e9, _BOOK),
    "v5p": Wires(85.5e9, 2.06e9, 15e9, _BOOK),
    "v6e": Wires(58.9e9, 4.11e9, 32e9, _RECIPES),
    "7x": Wires(89.4e9, 4.11e9, 32e9, "links as an all-gather of 4 chips reaches them: Ironwood"),
}


def published_rates(generation: str) -> Rates:
    """The rates of a generation of `CHIPS`: compute and HBM as its maker specifies them, wires as
    published measurements show them."""
    chip, wires = CHIPS[generation], WIRES[generation]
    source = f"compute and HBM by specification; {wires.source}; collected in November 2026"
    rates = Rates(chip.flops, chip.bandwidth, wires.link, wires.network, wires.host, source)
    return dataclasses.replace(rates, flops_8bit=max(chip.flops_8bit.values(), default=None))


def transfer_seconds(rates: Rates, wiring: dict[str, Any], kind: str, sent: float) -> float:
    """Time to send so many bytes from the devices of each chip, over all links that it has along
    the axes, or over the network between slices. Of several devices of a chip in one ring, one
    alone sends to another chip. In an all-to-all each byte takes all hops to its target."""
    if wiring["slices"]:
        return sent / rates.network
    if not wiring["links"]:  # two devices of one chip
        return 0.0
    hops = max(1.0, wiring["hops"]) if "all-to-all" in kind else 1.0
    links = min(1, wiring["links"]) if kind == "collective-permute" else wiring["links"]
    return sent / wiring["shared"] * hops / (links * rates.by_kind.get(kind, rates.link))


def resource_seconds(
    cost: Cost, rates: Rates, wiring: dict[str, dict[str, Any]], per_chip: int
) -> dict[str, float]:
    """Time that a cost of each of `per_chip` devices of a chip takes of its resources. `wiring`: of
    the mesh axes that collectives use."""
    use: dict[str, float] = defaultdict(float)
    use["compute"] = rates.compute_seconds(cost.flops, cost.flops_8bit) * per_chip
    use["hbm"] = cost.hbm * per_chip / rates.hbm
    use["host"] = cost.host * per_chip / rates.host
    for (axes, kind), sent in cost.collectives.items():
        if axes != "none":
            medium = "network" if wiring[axes]["slices"] else "interconnect"
            use[medium] += transfer_seconds(rates, wiring[axes], kind, sent * per_chip)
    return use
