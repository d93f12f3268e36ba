"""A training step as a whole: bad steps, accumulation, frozen tensors, averages, metrics.

B rows, T tokens.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import grok
from grok import sharding
from grok.config import (
    AttentionConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParamGroup,
    RunConfig,
    TrainConfig,
)
from grok.model.build import to_arrays
from grok.optim.optimizer import make_optimizer
from grok.optim.param_groups import names, partition
from grok.train.bad_steps import detect_bad_step, init_guard
from grok.train.loss import batch_loss
from grok.train.state import TrainState, init_state
from grok.train.step import grad_slots, gradients, microbatches, train_step, with_grad_slots
from tests.fixtures.prove import in_suite

CONFIG = RunConfig(
    model=ModelConfig(
        vocab_size=32,
        num_layers=2,
        embed_dim=16,
        moe=MoEConfig(dim=24),
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
        compute_dtype="float32",
        remat="none",
    ),
    optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=4, ema_decay=0.75),
    train=TrainConfig(steps=10, z_loss=1e-3, router_balance_loss=0.01, grad_spike_factor=5),
)
FROZEN = (
    ParamGroup(match="layers/attention/*", frozen=True),
    ParamGroup(match="embed/*", frozen=True),
)
ACCUMULATING = dataclasses.replace(
    CONFIG,
    optimizer=dataclasses.replace(CONFIG.optimizer, param_groups=FROZEN),
    train=dataclasses.replace(CONFIG.train, grad_accum_steps=2),
)
ROWS, LENGTH = 16, 8


@functools.cache
def mesh() -> jax.sharding.Mesh:
    return sharding.make_mesh(data=2, devices=jax.devices()[:2])


@functools.cache
def batch(mask: float = 1) -> dict[str, jax.Array]:
    """Rows with padding, more of it in later rows, of which random tokens count with `mask`."""
    random = np.random.default_rng(5)
    shape = (ROWS, LENGTH)
    segments_BT = (np.arange(LENGTH)[None, :] <= LENGTH - np.arange(ROWS)[:, None] % 5).astype("i4")
    arrays_BT = {
        "tokens_BT": random.integers(1, 32, shape, dtype="i4"),
        "targets_BT": random.integers(1, 32, shape, dtype="i4"),
        "mask_BT": (random.random(shape) < 0.7).astype("f4") * segments_BT * mask,
        "segment_ids_BT": segments_BT,
    }
    return jax.device_put(arrays_BT, NamedSharding(mesh(), sharding.spec("batch", "length")))


@functools.cache
def first_state(config: RunConfig) -> TrainState:
    return init_state(config, make_optimizer(config), mesh())


@functools.cache
def compiled(config: RunConfig):
    step = functools.partial(train_step, config=config, optimizer=make_optimizer(config))
    return jax.jit(step)


def run_step(config: RunConfig, state: TrainState, data: dict) -> tuple[TrainState, dict]:
    with jax.set_mesh(mesh()):
        state, metrics = compiled(config)(state, data)
    return state, jax.device_get(metrics)


def by_name(model) -> dict[str, np.ndarray]:
    return jax.tree.map(np.asarray, to_arrays(model))


def assert_same(actual, right) -> None:
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def test_metrics_of_a_good_step_are_what_they_are_called():
    before = first_state(CONFIG)
    after, metrics = run_step(CONFIG, before, batch())
    old, new = by_name(before.model), by_name(after.model)
    for name, tensors in {
        "update_norm": [new[name] - old[name] for name in old],
        "update_norm/router": [new["layers/moe/router_DE"] - old["layers/moe/router_DE"]],
        "param_norm": new.values(),
    }.items():
        right = math.sqrt(sum(np.sum(x.astype("f8") ** 2) for x in tensors))
        assert metrics[name] == pytest.approx(right, rel=1e-4), name
    groups = ("embed", "attention", "router", "experts", "norms")
    for name in ("grad_norm", "update_norm"):
        together = math.sqrt(sum(metrics[f"{name}/{group}"] ** 2 for group in groups))
        assert metrics[name] == pytest.approx(together, rel=1e-5)
    assert metrics["learning_rate"] == pytest.approx(2e-3)
    assert 0 < metrics["router_entropy"] < math.log(8)
    assert metrics["expert_load_layers"].shape == (2, 8)
    np.testing.assert_allclose(metrics["expert_load_layers"].sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(
        metrics["expert_load"], metrics["expert_load_layers"].mean(0), rtol=1e-5
    )
    assert (metrics["skipped"], metrics["bad_in_a_row"], metrics["bad_tensors"].any()) == (0, 0, 0)
    assert after.guard.smoothed_norm == metrics["grad_norm"]


def test_the_average_of_the_weights_follows_them():
    before = first_state(CONFIG)
    assert_same(before.ema, before.model)
    after, _ = run_step(CONFIG, before, batch())
    ema, old, new = by_name(after.ema), by_name(before.model), by_name(after.model)
    for name, actual in ema.items():
        np.testing.assert_allclose(
            actual, 0.75 * old[name] + 0.25 * new[name], rtol=1e-6, atol=1e-8
        )


def test_a_step_that_is_not_finite_changes_no_bit_and_is_counted():
    start = first_state(CONFIG)
    state, bad = start, batch(mask=math.nan)
    for times in (1, 2):
        state, metrics = run_step(CONFIG, state, bad)
        for part in ("model", "opt_state", "ema"):
            assert_same(getattr(state, part), getattr(start, part))
        assert (int(state.step), int(state.guard.skipped)) == (times, times)
        assert (metrics["skipped"], metrics["bad_in_a_row"]) == (1, times)
        assert metrics["update_norm"] == 0
        assert metrics["bad_tensors"].all()
        assert len(metrics["bad_tensors"]) == len(names(state.model))
    # The good step after them is the one that would have been without them.
    late, metrics = run_step(CONFIG, state, batch())
    early, _ = run_step(CONFIG, start, batch())
    for part in ("model", "opt_state", "ema"):
        assert_same(getattr(late, part), getattr(early, part))
    assert (int(late.step), int(late.guard.bad_in_a_row), int(late.guard.skipped)) == (3, 0, 2)
    assert metrics["learning_rate"] == pytest.approx(2e-3)


def test_a_spike_is_skipped_and_blamed_on_the_largest_gradient():
    start = first_state(CONFIG)
    _, usual = run_step(CONFIG, start, batch())
    for times_usual, skipped in ((4.9, 0), (5.1, 1)):
        norm = jnp.asarray(usual["grad_norm"] / times_usual)
        guard = dataclasses.replace(
            start.guard, smoothed_norm=jax.device_put(norm, start.guard.smoothed_norm.sharding)
        )
        state, metrics = run_step(CONFIG, dataclasses.replace(start, guard=guard), batch())
        assert metrics["skipped"] == metrics["bad_tensors"].sum() == skipped
        if skipped:
            assert_same(state.model, start.model)
            assert state.guard.smoothed_norm == norm
        else:
            assert norm < state.guard.smoothed_norm < usual["grad_norm"]


def test_without_a_limit_only_what_is_not_finite_is_bad():
    squares = {"a": jnp.float32(1), "b": jnp.float32(jnp.inf)}
    usual = dataclasses.replace(init_guard(), smoothed_norm=jnp.float32(1e-9))
    bad, to_blame = detect_bad_step(usual, jnp.float32(1), squares, TrainConfig())
    assert (bool(bad), {name: bool(x) for name, x in to_blame.items()}) == (1, {"a": 0, "b": 1})
    bad, _ = detect_bad_step(usual, jnp.float32(1), {"a": squares["a"]}, TrainConfig())
    assert not bad
    bad, _ = detect_bad_step(usual, jnp.float32(jnp.nan), {"a": squares["a"]}, TrainConfig())
    assert bad


def test_frozen_tensors_keep_their_bits_and_have_no_gradient():
    start = first_state(ACCUMULATING)
    after, metrics = run_step(ACCUMULATING, start, batch())
    frozen = {name for name in names(start.model) if "attention/" in name or "embed/" in name}
    assert len(frozen) == 5
    for name, old in by_name(start.model).items():
        assert np.array_equal(old, by_name(after.model)[name]) == (name in frozen), name
    assert by_name(after.ema).keys() == by_name(start.model).keys() - frozen
    assert "grad_norm/attention" not in metrics
    assert metrics["grad_norm"] > 0


# ---- accumulation


@functools.cache
def gradients_in(n: int, balance: float) -> tuple:
    """Loss, report and gradients of the batch in microbatches."""
    config = dataclasses.replace(CONFIG.train, grad_accum_steps=n, router_balance_loss=balance)
    run = jax.jit(functools.partial(gradients, config=config))
    with jax.set_mesh(mesh()):
        model = first_state(CONFIG).model
        loss, report, grads = run(*partition(model, lambda name: True), batch())
    return float(loss), jax.device_get(report), by_name(grads)


@pytest.mark.parametrize("balance", in_suite([0.0, 1.0], 1.0))
def test_in_microbatches_the_gradient_is_that_of_the_batch(balance):
    (loss, report, grads), (right_loss, right_report, right) = (
        gradients_in(n, balance) for n in (4, 1)
    )
    assert loss == pytest.approx(right_loss, rel=1e-6)
    names = ["loss", "z_loss", "router_entropy", "expert_load", "expert_load_layers"]
    # Without its loss the balance is but reported, as the mean of microbatches.
    for name in names + ["router_balance"] * bool(balance):
        np.testing.assert_allclose(report[name], right_report[name], rtol=2e-6, err_msg=name)
    for name, grad in grads.items():
        # Sums over 85 tokens in another order: some units of 2^-24.
        assert np.abs(grad - right[name]).max() < 2e-6 * np.abs(right[name]).max(), name


def test_rows_of_microbatches_stay_on_their_devices():
    rows = NamedSharding(mesh(), sharding.spec("batch", "length"))
    array_BT = jax.device_put(jnp.arange(ROWS)[:, None] * jnp.ones((1, LENGTH), "i4"), rows)
    with jax.set_mesh(mesh()):
        split = jax.jit(lambda x: microbatches(x, 2)).lower(array_BT).compile()
        rows_nBT = np.asarray(split(array_BT))
    np.testing.assert_array_equal(rows_nBT[:, :, 0], np.arange(ROWS).reshape(-1, 2).T)
    text = split.as_text()
    for move in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert move not in text


def test_gradients_left_in_the_type_of_computation_are_those_of_float32():
    """What a TPU does, where a matrix's gradient stays bfloat16 until the optimizer has it."""
    config = dataclasses.replace(CONFIG.model, compute_dtype="bfloat16")
    model = grok.init(config, jax.random.key(0))
    data = {name: np.asarray(array) for name, array in batch().items()}

    def loss(slots):
        return batch_loss(with_grad_slots(model, slots), data, CONFIG.train)[0]

    small = jax.jit(jax.grad(loss))(grad_slots(model, config))
    dtypes = {name: array.dtype.name for name, array in to_arrays(small).items()}
    assert dtypes["layers/moe/w_gate_EDF"] == dtypes["layers/attention/w_out_NHD"] == "bfloat16"
    assert dtypes["embed/table_VD"] == dtypes["layers/moe/router_DE"] == "float32"
    expected = to_arrays(jax.jit(jax.grad(loss))(model))
    for name, array in to_arrays(small).items():
        ours, right = np.asarray(array, np.float32), np.asarray(expected[name])
        # A compiler may leave out the rounding to 8 bits that the slot has.
        np.testing.assert_allclose(ours, right, rtol=0, atol=2**-8 * abs(right).max(), err_msg=name)


def test_on_one_cpu_nothing_that_is_trained_is_copied():
    """Parameters and moments change where they are, a gradient is summed over nobody, and of the
    weights that the backward pass needs there is no second copy."""
    one = sharding.make_mesh(devices=jax.devices()[:1])
    optimizer = make_optimizer(CONFIG)
    step = functools.partial(train_step, config=CONFIG, optimizer=optimizer)
    tokens_BT = np.ones((ROWS, LENGTH), "i4")
    data = {"tokens_BT": tokens_BT, "targets_BT": tokens_BT, "mask_BT": tokens_BT.astype("f4")}
    with jax.set_mesh(one):
        state = init_state(CONFIG, optimizer, one)
        text = jax.jit(step, donate_argnums=0).lower(state, data).compile().as_text()
    assert "all-reduce" not in text
    assert re.search(r"= f32\[2,8,16,24\]\S* fusion\(%state_model_layers_moe_w_", text)
    assert not re.search(r" copy\(%state_\w+_moe_w_", text)
    L, E, D, F = 2, 8, 16, 24
    written = re.findall(rf"= f32\[{L},{E},(?:{D},{F}|{F},{D})\]\S* dynamic-update-slice\(", text)
    assert len(written) == 3  # the gradients alone
