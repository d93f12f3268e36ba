"""The state that a step changes: step number, parameters, optimizer moments, guard, average."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from optax import GradientTransformation, OptState

from grok import sharding
from grok.config import RunConfig
from grok.model import build
from grok.model.build import quick_to_compile
from grok.model.decoder import Decoder
from grok.model.lora import adapted
from grok.optim.offload import placed_on_host
from grok.optim.param_groups import partition, trainable
from grok.train.bad_steps import Guard, init_guard
from grok.weights.cast import quantized_groups


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """The state of a run between steps, saved and restored; a pytree, donated from step to step."""

    step: jax.Array  # int32 scalar: steps done, bad ones among them
    model: Decoder
    opt_state: OptState  # of the trained parameters alone
    guard: Guard
    ema: Any  # moving average of the trained parameters, float32; None when the run has none


def init_state(
    config: RunConfig, optimizer: GradientTransformation, mesh: Mesh, model: Decoder | None = None
) -> TrainState:
    """Returns a fresh TrainState, every array made on the devices that hold it: parameters of
    `model`, which is donated, or else drawn from the seed; adapters are new."""
    make = _make(config, optimizer)
    abstract = abstract_state(config, optimizer, mesh, model)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    jit = functools.partial(jax.jit, out_shardings=shardings, compiler_options=quick_to_compile())
    with jax.set_mesh(mesh):
        return jit(make)() if model is None else jit(make, donate_argnums=0)(model)


def abstract_state(
    config: RunConfig, optimizer: GradientTransformation, mesh: Mesh, model: Decoder | None = None
) -> TrainState:
    """Shapes, dtypes and shardings of `init_state`'s result, with nothing computed. Without `model`
    a quantised one has scales as when it is made from floats."""
    args: tuple[Decoder, ...] = ()
    if config.model.is_quantized:
        args = (model or build.abstract(config.model, mesh, quantized_groups(config.model)),)
    state = sharding.abstract_arrays(_make(config, optimizer), mesh, *args)
    if config.optimizer.offload:
        state.opt_state = placed_on_host(state.opt_state)
    return state


def start_state(config: RunConfig, optimizer: GradientTransformation, model: Decoder) -> TrainState:
    """The state of a run that starts from `model`; traced, or on arrays."""
    params = as_float32(partition(model, trainable(config))[0])
    # A copy: a step cannot be given the same array twice.
    ema = jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else None
    return TrainState(jnp.zeros((), jnp.int32), model, optimizer.init(params), init_guard(), ema)


def _make(config: RunConfig, optimizer: GradientTransformation):
    def make(model: Decoder | None = None) -> TrainState:
        key = jax.random.key(config.train.seed)
        model = model or Decoder(config.model, key)
        if config.lora.rank:
            model = adapted(model, config.lora, key)
        return start_state(config, optimizer, model)

    return make


def as_float32(tree):
    """The tree in float32, which moments are computed in whatever the parameters' type."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
