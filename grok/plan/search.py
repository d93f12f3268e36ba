"""A search of meshes, remat policies and batch sizes: those that may fit, by a rough count of what
they move. The figures of the ranking come from compiled programs alone."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from grok.config import RunConfig
from grok.config.mesh import batch_shards, meshes
from grok.errors import ConfigError
from grok.hardware import GIB
from grok.model.mesh_fit import check_plan_fits
from grok.model.params import num_active_parameters, num_parameters
from grok.plan.estimate import Plan, tokens_of
from grok.plan.suggestions import BYTES, replace_keys, state_bytes
from grok.plan.topology import Slice

REMAT = ("selective", "offload", "full")
# Rough number of arrays of the residual stream's size that a layer saves for the backward pass.
SAVED_ARRAYS = {
    "none": 16,
    "dots": 4,
    "selective": 6,
    "attention": 2,
    "experts": 2,
    "offload": 0,
    "full": 1,
}
# Rough share of the forward pass that is computed again: of an MLP two of three products.
RECOMPUTED = {"selective": 2 / 3, "offload": 1, "full": 1}
ROWS_PER_DEVICE = (1, 2, 4)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A config to compile; `overrides` are the keys that make it differ."""

    config: RunConfig
    overrides: tuple[str, ...]
    seconds_per_token: float  # a rough guess, for the order alone

    def __str__(self) -> str:
        return " ".join(self.overrides)


def candidates(config: RunConfig, slice_: Slice) -> list[Candidate]:
    """All candidates that may fit, the most promising first."""
    if not (fitting := [c for c in _legal(config, slice_) if _may_fit(c.config, slice_)]):
        problem = f"no mesh on {slice_} has room for the state and a row on each of its chips"
        fewer = "fewer bytes a parameter as with optimizer.moments_dtype=bfloat16"
        raise ConfigError(f"{problem}; a larger slice, or {fewer}, may work.")
    return sorted(fitting, key=lambda candidate: candidate.seconds_per_token)


def ranking(plans: list[tuple[Candidate, Plan]]) -> str:
    """The compiled candidates, fastest first, and the overrides of the best."""
    fitting = [(candidate, plan) for candidate, plan in plans if plan.fits]
    fitting.sort(key=lambda pair: -pair[1].tokens_per_second()["scheduled"])
    lines = []
    for candidate, plan in fitting:
        rates, size = plan.tokens_per_second(), (plan.total or 0) / GIB
        text = f"{rates['scheduled']:8,.0f} tokens/s/chip"
        text += f" ({rates['serial']:,.0f} to {rates['overlapped']:,.0f})"
        lines.append(f"{text}, {size:.1f} GiB a chip: {candidate}")
    lines += [f"    does not fit: {candidate}" for candidate, plan in plans if not plan.fits]
    if fitting:
        lines += ["", "the best, as overrides:", *fitting[0][0].overrides]
    return "\n".join(lines)


def _legal(config: RunConfig, slice_: Slice) -> Iterator[Candidate]:
    devices = slice_.num_chips * slice_.chip.devices
    training = config.plan.program == "train"
    policies = REMAT if training else (config.model.remat,)
    rows_per_device = ROWS_PER_DEVICE if training else (1,)
    sizes = meshes(devices, slice_.count)
    for mesh, remat, rows in itertools.product(sizes, policies, rows_per_device):
        overrides: dict[str, Any] = {f"mesh.{axis}": size for axis, size in mesh.items()}
        if training:
            batch = batch_shards(mesh) * rows * config.train.grad_accum_steps
            overrides |= {"model.remat": remat, "data.batch_size": batch}
        try:
            changed = replace_keys(config, overrides)
            check_plan_fits(changed, devices)
        except ConfigError:
            continue
        lines = tuple(f"{key}={value}" for key, value in overrides.items())
        yield Candidate(changed, lines, _seconds_per_token(changed, mesh, slice_))


def _may_fit(config: RunConfig, slice_: Slice) -> bool:
    """True if the state and a rough count of the rest fit a chip: saved activations, a layer's
    weights and their gradients, rows in collectives, the table."""
    model, mesh = config.model, config.mesh
    shards = mesh.data * mesh.expert * mesh.tensor / slice_.chip.devices
    state = state_bytes(config) * num_parameters(model) / shards
    devices = mesh.slice * mesh.data * mesh.expert
    tokens = tokens_of(config) / (devices * config.train.grad_accum_steps)
    layer = 2 * num_parameters(model) / model.num_layers / (mesh.expert * mesh.tensor)
    table = 2 * model.vocab_size * model.embed_dim / mesh.tensor
    moving = 4 * tokens * mesh.expert * model.embed_dim
    saved = SAVED_ARRAYS[model.remat] * tokens * model.embed_dim / mesh.tensor
    if config.plan.program != "train":
        temporaries = 2 * table + 3 * moving
    else:
        temporaries = 2 * saved * model.num_layers + 8 * layer + 3 * table + 3 * moving
    return state + temporaries <= slice_.chip.hbm


def _seconds_per_token(config: RunConfig, mesh: dict[str, int], slice_: Slice) -> float:
    """Rough seconds per token of what a step moves between chips and recomputes: parameters are
    gathered over data twice and their gradients scattered once; tokens go to experts and back;
    tensor reduces what goes into and out of a block, twice."""
    model, tokens, training = config.model, tokens_of(config), config.plan.program == "train"
    passes = 3 if training else 1
    width = 2 if training else min(2, BYTES[model.param_dtype])  # bytes of a value that moves
    data, expert, tensor = mesh["data"], mesh["expert"], mesh["tensor"]
    on_device = tokens / batch_shards(mesh)
    weights = width * num_parameters(model) / (expert * tensor) * (data > 1)
    routed = 2 * 2 * on_device * (expert - 1) * model.embed_dim * model.num_layers
    reduced = 2 * 4 * on_device * expert * model.embed_dim * model.num_layers * (tensor > 1)
    links = 2 * slice_.chip.link
    share = RECOMPUTED.get(model.remat, 0) if training else 0
    recomputed = 2 * num_active_parameters(model) * share
    compute = tokens * recomputed / (slice_.num_chips * slice_.chip.flops)
    return (passes * (weights + routed + reduced) / links + compute) / tokens
