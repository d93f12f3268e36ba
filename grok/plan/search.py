"""Which meshes, remat policies and batch sizes are worth compiling, and how those compare.

What is legal is listed, what cannot fit is left out, and the rest is ordered by a rough count of
what it moves; the figures of the ranking come from compiled programs alone.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from grok.config import RunConfig, check_fits, check_model_fits
from grok.errors import ConfigError
from grok.plan.estimate import Plan, batch_of
from grok.plan.suggestions import BYTES, state_bytes
from grok.plan.topology import Slice

REMAT: tuple[Literal["dots", "offload", "full"], ...] = ("dots", "offload", "full")
# Arrays of the residual stream's size that a layer keeps for the backward pass, roughly.
KEPT = {"none": 16, "dots": 4, "attention": 2, "experts": 2, "offload": 0, "full": 1}
ROWS = (1, 2, 4)  # of each device's batch


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A config to compile; `lines` are those that set it apart."""

    config: RunConfig
    lines: tuple[str, ...]
    seconds: float  # a rough guess, for the order alone

    def describe(self) -> str:
        """The lines on one."""
        return " ".join(self.lines)


def candidates(config: RunConfig, slice_: Slice) -> list[Candidate]:
    """All that may work, the most promising first."""
    found = [each for each in _legal(config, slice_) if _holds(each.config, slice_)]
    if not found:
        raise ConfigError(
            f"no mesh on {slice_} has room for the state and a row on each of its chips; a larger "
            "slice, or fewer bytes a parameter as with optimizer.moments_dtype=bfloat16, may work."
        )
    return sorted(found, key=lambda each: each.seconds)


def ranking(found: list[tuple[Candidate, Plan]]) -> str:
    """The compiled candidates, fastest first, and the config lines of the best."""
    fitting = [(each, plan) for each, plan in found if plan.fits]
    fitting.sort(key=lambda pair: -pair[1].tokens_per_second()["serial"])
    lines = [
        f"{rates['serial']:8,.0f} to {rates['overlapped']:,.0f} tokens/s/chip, "
        f"{(plan.total or 0) / 2**30:.1f} GiB a chip: {each.describe()}"
        for each, plan in fitting
        for rates in [plan.tokens_per_second()]
    ]
    lines += [f"    does not fit: {each.describe()}" for each, plan in found if not plan.fits]
    if fitting:
        lines += ["", "the best, as overrides:", *fitting[0][0].lines]
    return "\n".join(lines)


def _legal(config: RunConfig, slice_: Slice) -> Iterator[Candidate]:
    devices = slice_.num_chips * slice_.chip.devices
    training = config.plan.program == "train"
    for sizes in _meshes(devices, slice_.count):
        shards = sizes["slice"] * sizes["data"] * sizes["expert"]
        for remat in REMAT if training else (config.model.remat,):
            for rows in ROWS if training else (None,):
                lines = [f"mesh.{axis}={size}" for axis, size in sizes.items()]
                changed = dataclasses.replace(
                    config, mesh=dataclasses.replace(config.mesh, **sizes)
                )
                if rows is not None:
                    batch = shards * rows * config.train.grad_accum_steps
                    lines += [f"model.remat={remat}", f"data.batch_size={batch}"]
                    changed = dataclasses.replace(
                        changed,
                        model=dataclasses.replace(config.model, remat=remat),
                        data=dataclasses.replace(config.data, batch_size=batch),
                    )
                try:
                    if training:
                        check_fits(changed, devices)
                    else:
                        check_model_fits(config.model, sizes)
                except ConfigError:
                    continue
                if not training and config.plan.batch_size % shards:
                    continue
                yield Candidate(changed, tuple(lines), _guess(changed, sizes, slice_))


def _meshes(devices: int, slices: int) -> Iterator[dict[str, int]]:
    inside = devices // slices
    for expert in _divisors(inside):
        for tensor in _divisors(inside // expert):
            data = inside // (expert * tensor)
            yield {"slice": slices, "data": data, "expert": expert, "tensor": tensor}


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _holds(config: RunConfig, slice_: Slice) -> bool:
    """Whether state and a rough count of the rest fit a chip: what is kept of each layer for the
    backward pass, a layer's weights and their gradients, rows on their way, the table."""
    model, mesh = config.model, config.mesh
    shards = mesh.data * mesh.expert * mesh.tensor / slice_.chip.devices
    state = state_bytes(config) * model.num_parameters() / shards
    rows, length = batch_of(config)
    tokens = rows / (mesh.slice * mesh.data * mesh.expert * config.train.grad_accum_steps)
    tokens *= 1 if config.plan.program == "decode" else length
    layer = 2 * model.num_parameters() / model.num_layers / (mesh.expert * mesh.tensor)
    table = 2 * model.vocab_size * model.embed_dim / mesh.tensor
    moving = 4 * tokens * mesh.expert * model.embed_dim
    kept = KEPT[model.remat] * tokens * model.embed_dim / mesh.tensor
    if config.plan.program != "train":
        temporaries = 2 * table + 3 * moving
    else:
        temporaries = 2 * kept * model.num_layers + 8 * layer + 3 * table + 3 * moving
    return state + temporaries <= slice_.chip.hbm


def _guess(config: RunConfig, sizes: dict[str, int], slice_: Slice) -> float:
    """Seconds a token of what a step moves between chips and computes again, roughly.

    Parameters are gathered over data twice and their gradients scattered once; tokens go to experts
    and back; tensor sums what goes into and out of a block, twice.
    """
    model, passes = config.model, 3 if config.plan.program == "train" else 1
    width = 2  # bytes of what is moved
    data, expert, tensor = sizes["data"], sizes["expert"], sizes["tensor"]
    if config.plan.program == "train":
        tokens = config.data.batch_size * config.data.sequence_length
    else:
        length = config.plan.tokens if config.plan.program == "prefill" else 1
        tokens = config.plan.batch_size * length
        width = min(2, BYTES[model.param_dtype])
    on_device = tokens / (sizes["slice"] * data * expert)
    weights = width * model.num_parameters() / (expert * tensor) * (data > 1)
    routed = 2 * 2 * on_device * (expert - 1) * model.embed_dim * model.num_layers
    summed = 2 * 4 * on_device * expert * model.embed_dim * model.num_layers * (tensor > 1)
    links = 2 * slice_.chip.link
    again = passes == 3 and model.remat in ("offload", "full")
    recomputed = 2 * model.num_active_parameters() * again
    compute = tokens * recomputed / (slice_.num_chips * slice_.chip.flops)
    return (passes * (weights + routed + summed) / links + compute) / tokens
