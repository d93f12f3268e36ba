"""The schedule's shape, what is decayed, and in which type moments are kept."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from grok.config import OptimizerConfig, RunConfig
from grok.sharding import make_mesh
from grok.train.optimizer import make_optimizer, make_schedule
from grok.train.state import abstract_state, init_state


def test_schedule_rises_to_the_peak_and_falls_to_its_last_share():
    config = OptimizerConfig(peak_lr=1e-3, warmup_steps=4, final_lr_share=0.1)
    rate = make_schedule(config, steps=104)
    rates = [float(rate(step)) for step in range(105)]
    assert rates[:5] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3])
    assert max(rates) == rates[4]
    assert rates[54] == pytest.approx(5.5e-4)  # half-way down the cosine: the mean of both ends
    assert rates[104] == pytest.approx(1e-4)


def test_without_warm_up_the_first_step_has_the_peak_rate():
    rate = make_schedule(OptimizerConfig(peak_lr=1e-3, warmup_steps=0), steps=10)
    assert float(rate(0)) == pytest.approx(1e-3)


def test_matrices_decay_and_norm_scales_do_not(tiny_run: RunConfig):
    decaying = dataclasses.replace(tiny_run.optimizer, weight_decay=0.5, warmup_steps=0)
    config = dataclasses.replace(tiny_run, optimizer=decaying)
    optimizer = make_optimizer(config)
    state = init_state(config, optimizer, make_mesh(devices=jax.devices()[:1]))
    zeros = jax.tree.map(jnp.zeros_like, state.model)
    updates, _ = jax.jit(optimizer.update)(zeros, state.opt_state, state.model)
    for path, update in jax.tree_util.tree_flatten_with_path(updates)[0]:
        moved = bool(jnp.any(update != 0))
        assert moved == ("scale_D" not in jax.tree_util.keystr(path)), path


def test_moments_are_float32_when_parameters_are_bfloat16(tiny_run: RunConfig):
    model = dataclasses.replace(tiny_run.model, param_dtype="bfloat16")
    config = dataclasses.replace(tiny_run, model=model)
    optimizer = make_optimizer(config)
    state = abstract_state(config, optimizer, make_mesh(devices=jax.devices()[:1]))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.model)} == {jnp.dtype("bfloat16")}
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert {leaf.dtype for leaf in moments} == {jnp.dtype("float32")}
