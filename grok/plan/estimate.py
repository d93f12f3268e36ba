"""The costs of a compiled program -> its time on a slice, by a roofline (Williams et al. 2009) with
interconnect as third term: at least the longest term (all overlap), at most about their sum (none
does), and in between what the compiled schedule says (`grok.plan.schedule`)."""

import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

from grok.config import RunConfig
from grok.config.load import configs_folder
from grok.errors import ConfigError
from grok.hardware import GIB
from grok.model.flops import attention_flops, decode_flops, flops_per_token
from grok.plan.rates import Rates, transfer_seconds
from grok.plan.topology import Slice


class Price(NamedTuple):
    """Price of one chip."""

    usd_per_hour: float
    source: str  # of the figure


def price_of(generation: str, file: Path | None) -> Price | None:
    """The lowest on-demand price; None if the file has none, ConfigError if it cannot be read.
    Without one, the dated file that people edit: the package's, or launch/prices.env."""
    folder = configs_folder()
    inside = folder / "prices.env"
    file = file or (inside if inside.is_file() else folder.parent / "launch" / "prices.env")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read as prices: {error}.") from None
    date = re.search(r'^PRICES_DATE="?([^"\n]*)', text, re.MULTILINE)
    if (price := re.search(rf"\bPRICE_{generation}_on_demand_LOW=([\d.]+)", text)) is None:
        return None
    dated = date[1] if date else "without a date"
    return Price(float(price[1]), f"on demand, {file.name} {dated}")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The figures of a plan, bytes and FLOPs of one chip and step; those that need a compiled
    program are None or empty where it does not fit."""

    config: RunConfig
    slice: Slice
    mesh_sizes: dict[str, int]
    fits: bool
    state: float  # bytes that persist from step to step: the arguments
    total: float | None  # bytes at the peak
    model_flops: float
    rates: Rates
    batch: tuple[int, int]  # rows of a step, and tokens in each
    tokens: float  # of a step and chip
    flops: float | None = None
    flops_8bit: float = 0.0  # of these, of products of 8-bit values
    hbm: float | None = None
    host: float | None = None  # bytes to and from host memory
    host_memory: float = 0.0  # bytes of it in use
    collectives: dict[str, dict[str, float]] | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # by term of the roofline
    scheduled: float | None = None  # seconds of a step by the compiled schedule
    interconnect: dict[str, float] = dataclasses.field(default_factory=dict)  # by mesh axes
    price: Price | None = None
    compile_seconds: float | None = None
    ratio: float | None = None  # of a step over its schedule, as a calibration measured one
    ratio_source: str = ""  # in words
    measured: dict[str, Any] = dataclasses.field(default_factory=dict)  # by compile_process

    def step_seconds(self) -> dict[str, float]:
        """Time of a step by the compiled schedule, if all terms overlap, and if none does; first by
        the ratio of a calibration, if there is one."""
        if not (times := self.seconds.values()):
            return {}
        assert self.scheduled is not None
        steps = {} if self.ratio is None else {"calibrated": self.scheduled * self.ratio}
        return steps | {
            "scheduled": self.scheduled,
            "overlapped": max(times),
            "serial": sum(times),
        }

    def tokens_per_second(self) -> dict[str, float]:
        """Tokens per second and chip."""
        return {name: self.tokens / time for name, time in self.step_seconds().items()}

    def mfu(self) -> dict[str, float]:
        """Model FLOPs utilisation: the model's own FLOPs as a share of the chip's published peak,
        or where none is, of the measured rate."""
        peak = self.slice.chip.flops or self.rates.flops
        return {name: self.model_flops / time / peak for name, time in self.step_seconds().items()}

    def usd_per_billion_tokens(self) -> dict[str, float]:
        """Price of a billion tokens; empty if the chip's is not known."""
        if self.price is None:
            return {}
        price = self.price.usd_per_hour / 3600 * 1e9
        return {name: price / rate for name, rate in self.tokens_per_second().items()}

    def async_collective_share(self) -> float | None:
        """Share of the bytes in collectives that run beside other instructions; None where there
        are none."""
        schedule = self.measured.get("schedule", {"sent": 0})
        return schedule["sent_beside"] / schedule["sent"] if schedule["sent"] else None

    def to_dict(self) -> dict[str, Any]:
        """The object that `grok plan --json` prints. The price is that of the scheduled step, or
        of the calibrated one, if there is one."""
        total, prices = self.total, self.usd_per_billion_tokens()
        return {
            "fits": self.fits,
            "hbm_gib_per_chip": {
                "state": self.state / GIB,
                "temporaries": None if total is None else (total - self.state) / GIB,
                "total": None if total is None else total / GIB,
                "capacity": self.slice.chip.hbm / GIB,
            },
            "flops_per_chip_per_step": {
                "model": self.model_flops,
                "compiled": self.flops,
                "compiled_8bit": self.flops_8bit,
            },
            "hbm_bytes_per_chip_per_step": self.hbm,
            "host_bytes_per_chip_per_step": self.host,
            "collective_bytes_per_chip_per_step": self.collectives,
            "async_collective_share": self.async_collective_share(),
            "seconds": {**self.seconds, **self.step_seconds()} or None,
            "mfu": self.mfu() or None,
            "tokens_per_second_per_chip": self.tokens_per_second() or None,
            "usd_per_billion_tokens": prices.get("calibrated", prices.get("scheduled")),
            "compile_seconds": self.compile_seconds,
            "rates": self.rates.source,
        }


def make_plan(
    config: RunConfig,
    slice_: Slice,
    rates: Rates,
    measured: dict[str, Any],
    price: Price | None,
) -> Plan:
    """The plan from the measurements of `grok.plan.compile_process`, which are per device."""
    per_chip = measured["devices_per_chip"]
    common: dict[str, Any] = {
        "config": config,
        "slice": slice_,
        "rates": rates,
        "mesh_sizes": measured["mesh_sizes"],
        "state": measured["state"] * per_chip,
        "model_flops": model_flops(config) / slice_.num_chips,
        "batch": batch_of(config),
        "tokens": tokens_of(config) / slice_.num_chips,
        "price": price,
        "measured": measured,
    }
    if "peak" not in measured:
        required = measured["required"]
        return Plan(fits=False, total=required and required * per_chip, **common)
    collectives: dict[str, dict[str, float]] = {}
    interconnect: dict[str, float] = {}
    for axes, kind, sent in measured["collectives"]:
        if axes != "none" and sent:
            collectives.setdefault(axes, {})[kind] = sent * per_chip
            seconds = transfer_seconds(rates, measured["wiring"][axes], kind, sent * per_chip)
            interconnect[axes] = interconnect.get(axes, 0) + seconds
    names = "flops", "flops_8bit", "hbm", "host", "host_memory"
    amounts = {name: measured.get(name, 0.0) * per_chip for name in names}
    compute = rates.compute_seconds(amounts["flops"], amounts["flops_8bit"])
    terms = {"compute": compute, "hbm": amounts["hbm"] / rates.hbm}
    terms["interconnect"] = sum(interconnect.values())
    between_slices = {axes for axes, wires in measured["wiring"].items() if wires["slices"]}
    if between_slices:
        terms["network"] = sum(interconnect.get(axes, 0) for axes in between_slices)
        terms["interconnect"] -= terms["network"]
    if amounts["host"]:
        terms["host"] = amounts["host"] / rates.host
    scheduled = measured["schedule"]["seconds"]
    if config.plan.program == "decode":  # the devices are a step ahead of the engine
        terms["engine"] = engine_seconds(batch_of(config)[0])
        scheduled = max(scheduled, terms["engine"])
    common |= amounts | {"collectives": collectives, "interconnect": interconnect}
    common |= {"scheduled": scheduled, "seconds": terms}
    total, compile_seconds = measured["peak"] * per_chip, measured["compile_seconds"]
    return Plan(fits=True, total=total, compile_seconds=compile_seconds, **common)


def engine_seconds(rows: int) -> float:
    """Time that the engine's thread works for a decode step, as measured on two CPU cores: 0.6 ms
    for 64 rows, 2.2 ms for 256 (benchmarks/results/cpu.md)."""
    return 0.07e-3 + 8.3e-6 * rows


def batch_of(config: RunConfig) -> tuple[int, int]:
    """Rows of a step and tokens per row, of the largest batch of the run."""
    if config.plan.program != "train":
        return config.plan.batch_size, config.plan.tokens
    shapes = [(B, T) for _, B, T in config.data.shapes()]
    return max(shapes, key=lambda shape: (shape[0] * shape[1], shape[1]))


def tokens_of(config: RunConfig) -> int:
    """Tokens of a step."""
    rows, length = batch_of(config)
    return rows if config.plan.program == "decode" else rows * length


def model_flops(config: RunConfig) -> float:
    """FLOPs that the model itself needs for a step."""
    model, (rows, length) = config.model, batch_of(config)
    if config.plan.program == "train":
        return rows * length * flops_per_token(model, length)
    # A third of a training step is the forward pass; only the last token of a row has logits.
    table = 2 * model.vocab_size * model.embed_dim
    if config.plan.program == "prefill":
        return rows * (length * (flops_per_token(model, length) / 3 - table) + table)
    return float(rows * decode_flops(model, length))


def recomputed_flops(plan: Plan) -> float:
    """FLOPs of a chip and step that `model.remat` recomputes in the backward pass."""
    model = plan.config.model
    if plan.config.plan.program != "train" or model.remat in ("none", "dots"):
        return 0.0
    again = flops_per_token(model, plan.batch[1]) / 3 - 2 * model.vocab_size * model.embed_dim
    if model.remat in ("attention", "selective"):
        again -= attention_flops(model, plan.batch[1])
    if model.remat == "selective":
        heads = model.attention.num_heads + model.attention.num_kv_heads
        again -= 4 * model.num_layers * model.embed_dim * heads * model.attention.head_dim
    if model.saves_experts:
        width = 0 if model.mlp is None else model.mlp.dim
        width += 0 if model.moe is None else model.moe.num_selected * model.moe.dim
        again -= 2 * model.num_layers * model.embed_dim * width
    return plan.tokens * again
