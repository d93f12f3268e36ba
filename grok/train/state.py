"""Everything a step changes: the step number, the parameters, and the optimizer's moments."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from grok import sharding
from grok.config import RunConfig
from grok.model.grok import Grok


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """What is saved and restored; a plain pytree, donated from step to step."""

    step: jax.Array  # int32 scalar: steps done
    model: Grok
    opt_state: optax.OptState


def init_state(
    config: RunConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    model: Grok | None = None,
):
    """A fresh TrainState, every array made on the devices that hold it.

    Its parameters are those of `model`, which is given up to it, or else drawn from the seed.
    """
    make = _make(config, optimizer)
    placements = jax.tree.map(lambda leaf: leaf.sharding, sharding.abstract(make, mesh))
    with jax.set_mesh(mesh):
        if model is None:
            return jax.jit(make, out_shardings=placements)()
        return jax.jit(make, out_shardings=placements, donate_argnums=0)(model)


def abstract_state(config: RunConfig, optimizer: optax.GradientTransformation, mesh: Mesh):
    """Shapes, types and placements of `init_state`'s result, with nothing computed."""
    return sharding.abstract(_make(config, optimizer), mesh)


def _make(config: RunConfig, optimizer: optax.GradientTransformation):
    def make(model: Grok | None = None) -> TrainState:
        model = model or Grok(config.model, jax.random.key(config.train.seed))
        return TrainState(jnp.zeros((), jnp.int32), model, optimizer.init(as_float32(model)))

    return make


def as_float32(tree):
    """The tree in float32: moments are kept in it whatever the parameters' type."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
