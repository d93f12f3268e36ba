"""Memory accounting of plans: complete for every optimizer, dtype, remat policy and key."""

import dataclasses
import math

import jax
import pytest

import grok
from grok.config import MeshConfig, RunConfig
from grok.config.load import load_config
from grok.config.schema import schema
from grok.errors import ConfigError
from grok.model.params import num_parameters, tensor_specs
from grok.optim.optimizer import DIRECTIONS
from grok.plan.search import REMAT, SAVED_ARRAYS
from grok.plan.suggestions import BYTES, MOMENTS, SMALLER_STATES, STATE_KEYS, state_bytes
from grok.train.state import abstract_state

SETTINGS = schema(RunConfig)


def test_every_optimizer_and_dtype_and_remat_policy_has_its_row():
    names = SETTINGS["optimizer.name"].choices
    assert set(MOMENTS) == set(DIRECTIONS) == set(names), "a row in grok.plan.suggestions.MOMENTS"
    dtypes = {*SETTINGS["model.param_dtype"].choices, *SETTINGS["optimizer.moments_dtype"].choices}
    assert set(BYTES) == dtypes, "a row in grok.plan.suggestions.BYTES"
    policies = SETTINGS["model.remat"].choices
    assert set(SAVED_ARRAYS) == set(policies) > set(REMAT), "a row in grok.plan.search.SAVED_ARRAYS"
    assert all(key in SETTINGS for overrides in SMALLER_STATES for key in overrides)


@pytest.mark.parametrize("name", MOMENTS)
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_moments_are_those_that_the_optimizer_keeps(tiny_run, name, beta1):
    optimizer = dataclasses.replace(tiny_run.optimizer, name=name, beta1=beta1)
    run = dataclasses.replace(tiny_run, optimizer=optimizer, mesh=MeshConfig(data=1))
    mesh = grok.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = abstract_state(run, DIRECTIONS[name](optimizer, tensor_specs(run.model)), mesh)
    size = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(state.opt_state))
    moments = state_bytes(run) / 4 - 1
    assert moments <= size / (4 * num_parameters(run.model)) < moments + 1


def other_values(key):
    """Values of a key besides its default, of which one at least is legal."""
    setting = SETTINGS[key]
    if setting.choices:
        return [choice for choice in setting.choices if choice != setting.default]
    default = setting.default
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, float):
        return [0.0, 0.5, 2.0]
    return [8] if isinstance(default, int) else []


@pytest.mark.parametrize(
    "key",
    [k for k in SETTINGS if k.startswith(("optimizer.", "lora.", "train.", "data.", "model."))],
)
def test_the_keys_of_the_state_are_these(key):
    """A new key that changes what persists between steps must be in STATE_KEYS and state_bytes;
    the keys in STATE_KEYS do change it."""
    base = ["train.init_from=w"]
    base += ["optimizer.name=adafactor"] if key == "optimizer.beta1" else []
    before, changed = state_bytes(load_config("grok-10m", base)), False
    for value in other_values(key):
        try:
            after = state_bytes(load_config("grok-10m", [*base, f"{key}={value}"]))
        except ConfigError:
            continue
        changed |= after != before
    assert changed == (key in STATE_KEYS)
