"""What would make a program fit that does not: counted from its state, not compiled."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from grok.config import RunConfig
from grok.hardware import GIB
from grok.plan.estimate import Plan
from grok.plan.topology import Slice, grown

# Where the compiler was not asked, since the state alone is too much, so much is left to the rest.
SHARE_FOR_STATE = 0.6
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def remedies(plan: Plan) -> Iterator[str]:
    """Changes that would bring the program under the capacity, each by itself, a phrase each."""
    for change, config in _changes(plan):
        state = plan.state * state_bytes(config) / state_bytes(plan.config)
        if fits(plan, state):
            yield f"{change}: state of {state / GIB:,.1f} GiB a chip"
    larger = larger_slice(plan)
    if larger is not None:
        state = plan.state * plan.slice.num_chips / larger.num_chips
        yield (
            f"--topology {larger.name}, with more of mesh.data and as many rows a chip: state of "
            f"{state / GIB:,.1f} GiB a chip"
        )
    if plan.config.plan.program != "train":
        yield f"fewer rows or tokens than {plan.batch[0]} x {plan.batch[1]}"
        return
    rows = plan.batch[0] // (plan.sizes["slice"] * plan.sizes["data"] * plan.sizes["expert"])
    if plan.total is not None and rows > plan.config.train.grad_accum_steps:
        yield f"train.grad_accum_steps={rows}, a row of each chip at a time: fewer temporaries"
    if plan.total is not None and plan.config.model.remat not in ("offload", "full"):
        yield "model.remat=full: fewer temporaries"
    if plan.total is not None and plan.config.model.remat != "offload":
        yield "model.remat=offload: what blocks keep for the backward pass lies with the hosts"


def fits(plan: Plan, state: float) -> bool:
    """Whether so much state a chip would leave room for what else the program has there."""
    capacity = plan.slice.chip.hbm
    if plan.total is None:
        return state <= SHARE_FOR_STATE * capacity
    return state + plan.total - plan.state <= capacity


def larger_slice(plan: Plan) -> Slice | None:
    """The first larger slice of the same chips on which it would fit."""
    larger: Slice | None = plan.slice
    while larger is not None:
        larger = grown(larger)
        if larger and fits(plan, plan.state * plan.slice.num_chips / larger.num_chips):
            return larger
    return None


def state_bytes(config: RunConfig) -> float:
    """Bytes a parameter of what is kept from step to step."""
    weights = BYTES[config.model.param_dtype]
    if config.plan.program != "train" or config.lora.rank:
        return weights
    optimizer = config.optimizer
    first = 1 if optimizer.beta1 else 0
    moments = {"adamw": 2, "lion": 1, "muon": 1, "adafactor": first}[optimizer.name]
    if optimizer.offload:
        moments = 0
    average = 4 if optimizer.ema_decay else 0
    return weights + moments * BYTES[optimizer.moments_dtype] + average


def _changes(plan: Plan) -> Iterator[tuple[str, RunConfig]]:
    config = plan.config
    if config.plan.program != "train":
        if config.model.param_dtype != "int8":
            model = dataclasses.replace(config.model, param_dtype="int8")
            yield "model.param_dtype=int8", dataclasses.replace(config, model=model)
        return
    smaller: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
        ("optimizer.moments_dtype=bfloat16", {"moments_dtype": "bfloat16"}, {}),
        ("optimizer.offload=true", {"offload": True}, {}),
        ("optimizer.name=adafactor optimizer.beta1=0", {"name": "adafactor", "beta1": 0.0}, {}),
        (
            "optimizer.moments_dtype=bfloat16 model.param_dtype=bfloat16",
            {"moments_dtype": "bfloat16"},
            {"param_dtype": "bfloat16"},
        ),
    )
    for change, of_optimizer, of_model in smaller:
        changed = dataclasses.replace(
            config,
            optimizer=dataclasses.replace(config.optimizer, **of_optimizer),
            model=dataclasses.replace(config.model, **of_model),
        )
        if state_bytes(changed) < state_bytes(config):
            yield change, changed
