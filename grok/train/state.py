"""Everything a step changes: step number, parameters, the optimizer's moments, and what watches."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from grok import sharding
from grok.config import RunConfig
from grok.model.decoder import Grok, quick_to_compile
from grok.model.lora import adapted
from grok.optim.offload import placed_on_host
from grok.optim.param_groups import partition, trainable
from grok.train.bad_steps import Guard, init_guard


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """What is saved and restored; a plain pytree, donated from step to step."""

    step: jax.Array  # int32 scalar: steps done, bad ones among them
    model: Grok
    opt_state: optax.OptState  # of the trained parameters alone
    guard: Guard
    ema: Any  # moving average of the trained parameters, float32; None when the run has none


def init_state(
    config: RunConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    model: Grok | None = None,
):
    """A fresh TrainState, every array made on the devices that hold it.

    Its parameters are those of `model`, which is given up to it, or else drawn from the seed, and
    fresh adapters where the config has some.
    """
    make = _make(config, optimizer)
    wanted = abstract_state(config, optimizer, mesh)
    placements = jax.tree.map(lambda leaf: leaf.sharding, wanted)
    compiled = functools.partial(
        jax.jit, out_shardings=placements, compiler_options=quick_to_compile()
    )
    with jax.set_mesh(mesh):
        if model is None:
            return compiled(make)()
        return compiled(make, donate_argnums=0)(model)


def abstract_state(config: RunConfig, optimizer: optax.GradientTransformation, mesh: Mesh):
    """Shapes, types and placements of `init_state`'s result, with nothing computed."""
    state = sharding.abstract_arrays(_make(config, optimizer), mesh)
    if config.optimizer.offload:
        state.opt_state = placed_on_host(state.opt_state)
    return state


def start_state(
    config: RunConfig, optimizer: optax.GradientTransformation, model: Grok
) -> TrainState:
    """The state of a run that starts from `model`; traced, or on arrays."""
    trained, _ = partition(model, trainable(config))
    params = as_float32(trained)
    # Not the parameters themselves: a step could not be given the same array twice.
    ema = jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else None
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, model, optimizer.init(params), init_guard(), ema)


def _make(config: RunConfig, optimizer: optax.GradientTransformation):
    def make(model: Grok | None = None) -> TrainState:
        key = jax.random.key(config.train.seed)
        model = model or Grok(config.model, key)
        if config.lora.rank:
            model = adapted(model, config.lora, key)
        return start_state(config, optimizer, model)

    return make


def as_float32(tree):
    """The tree in float32: moments are made in it whatever the parameters' type."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
