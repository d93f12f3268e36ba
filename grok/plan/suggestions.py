"""Suggestions for a program that does not fit: counted from its state, not compiled."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from grok.config import RunConfig
from grok.config.mesh import batch_shards
from grok.errors import ConfigError
from grok.hardware import GIB
from grok.plan.estimate import Plan
from grok.plan.topology import grown

# Largest state that is suggested where the rest is unknown, as a share of HBM.
MAX_STATE_SHARE = 0.6
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.5, "int4_all": 0.5}
# Moments of each parameter, in optimizer.moments_dtype; adafactor's needs a beta1.
MOMENTS = {"adamw": 2, "lion": 1, "muon": 1, "adafactor": 1}
# Config keys that `state_bytes` depends on.
STATE_KEYS = (
    "model.param_dtype", "optimizer.name", "optimizer.beta1", "optimizer.moments_dtype",
    "optimizer.offload", "optimizer.ema_decay", "lora.rank", "plan.program",
)  # fmt: skip
SMALLER_STATES: tuple[dict[str, Any], ...] = (
    {"optimizer.moments_dtype": "bfloat16"},
    {"optimizer.offload": True},
    {"optimizer.name": "adafactor", "optimizer.beta1": 0.0},
    {"optimizer.moments_dtype": "bfloat16", "model.param_dtype": "bfloat16"},
)
# Of weights that are served, or frozen below adapters.
SMALLER_WEIGHTS = ({"model.param_dtype": "int8"}, {"model.param_dtype": "int4"})


def suggestions(plan: Plan) -> Iterator[str]:
    """Changes each of which would make the program fit, in words."""
    config, training = plan.config, plan.config.plan.program == "train"
    trains_weights = training and not config.lora.rank
    for overrides in SMALLER_STATES if trains_weights else SMALLER_WEIGHTS:
        try:
            change = state_bytes(replace_keys(config, overrides)) / state_bytes(config)
        except ConfigError:  # other keys do not go with these
            continue
        if change < 1 and fits(plan, plan.state * change):
            keys = " ".join(f"{key}={_yaml(value)}" for key, value in overrides.items())
            yield f"{keys}: state of {plan.state * change / GIB:,.1f} GiB a chip"
    larger = grown(plan.slice)
    while larger and not fits(plan, plan.state * plan.slice.num_chips / larger.num_chips):
        larger = grown(larger)
    if larger is not None:
        state = plan.state * plan.slice.num_chips / larger.num_chips / GIB
        scaled = "with more of mesh.data and as many rows a chip"
        yield f"--topology {larger.name}, {scaled}: state of {state:,.1f} GiB a chip"
    if not training:
        yield f"fewer rows or tokens than {plan.batch[0]} x {plan.batch[1]}"
    if plan.total is None or not training:
        return
    if (rows := plan.batch[0] // batch_shards(plan.mesh_sizes)) > config.train.grad_accum_steps:
        yield f"train.grad_accum_steps={rows}, one row per chip at a time: fewer temporaries"
    if config.model.remat not in ("offload", "full"):
        yield "model.remat=full: fewer temporaries"
    if config.model.remat != "offload":
        yield "model.remat=offload: saved activations are in host memory"


def fits(plan: Plan, state: float) -> bool:
    """True if a state of so many bytes a chip leaves room for the rest of the program."""
    if plan.total is None:
        return state <= MAX_STATE_SHARE * plan.slice.chip.hbm
    return state + plan.total - plan.state <= plan.slice.chip.hbm


def state_bytes(config: RunConfig) -> float:
    """Bytes of HBM per parameter that persist from step to step."""
    weights, optimizer = BYTES[config.model.param_dtype], config.optimizer
    if config.plan.program != "train" or config.lora.rank:
        return weights
    moments = MOMENTS[optimizer.name]
    if optimizer.offload or (optimizer.name == "adafactor" and not optimizer.beta1):
        moments = 0
    ema = BYTES["float32"] if optimizer.ema_decay else 0
    return weights + moments * BYTES[optimizer.moments_dtype] + ema


def replace_keys(config: RunConfig, overrides: dict[str, Any]) -> RunConfig:
    """The config with other values of dotted keys; ConfigError if they do not go together."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in overrides.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    changed = {s: dataclasses.replace(getattr(config, s), **keys) for s, keys in sections.items()}
    return dataclasses.replace(config, **changed)


def _yaml(value: Any) -> str:
    return "true" if value is True else f"{value:g}" if isinstance(value, float) else value
