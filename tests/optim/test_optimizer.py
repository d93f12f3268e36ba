"""Optimizers against plain NumPy, on one device and on a mesh; schedules; groups of tensors.

Shapes are those of a small model; gradients are drawn, so that no model has to be run.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from grok import sharding
from grok.checkpoint.manager import Checkpoints
from grok.checkpoint.retention import RetentionPolicy
from grok.config import (
    AttentionConfig,
    LoraConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParamGroup,
    RunConfig,
    TrainConfig,
)
from grok.config.schema import schema
from grok.errors import ConfigError
from grok.model.build import abstract, from_arrays, to_arrays
from grok.model.params import param_specs, tensor_specs
from grok.optim import optimizer
from grok.optim.adafactor import column_axes, row_axes
from grok.optim.muon import orthogonalize
from grok.optim.optimizer import keep_moments_in, make_optimizer, make_schedule
from grok.optim.param_groups import metric_group, names
from grok.plan.suggestions import MOMENTS
from grok.train.bad_steps import Guard
from grok.train.checkpointing import state_trees
from grok.train.state import TrainState, abstract_state

MODEL_CONFIG = ModelConfig(
    vocab_size=32,
    num_layers=2,
    embed_dim=16,
    moe=MoEConfig(dim=24),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
)
SPECS = param_specs(MODEL_CONFIG)
NAMES = schema(RunConfig)["optimizer.name"].choices
each_optimizer = pytest.mark.parametrize("name", NAMES)


def run_config(**optimizer) -> RunConfig:
    return RunConfig(
        model=MODEL_CONFIG,
        optimizer=OptimizerConfig(
            **{"peak_lr": 1e-2, "warmup_steps": 1, "weight_decay": 0.1, "max_grad_norm": 3}
            | optimizer
        ),
        train=TrainConfig(steps=10),
    )


@functools.cache
def arrays(seed: int) -> dict[str, np.ndarray]:
    """Every tensor of the model, normal."""
    random = np.random.default_rng(seed)
    shapes = to_arrays(abstract(MODEL_CONFIG))
    return {name: random.normal(size=leaf.shape).astype("f4") for name, leaf in shapes.items()}


# ---- the same optimizers once more, tensor by tensor, in float64


def oracle(config: OptimizerConfig, rates: list[float]) -> dict[str, np.ndarray]:
    """Parameters after one update for each rate, with gradients `arrays(1)`, `arrays(2)`, ..."""
    params = {name: x.astype("f8") for name, x in arrays(0).items()}
    memory = {name: {"m": 0.0, "v": 0.0} for name in params}
    for t, rate in enumerate(rates, 1):
        grads = {name: x.astype("f8") for name, x in arrays(t).items()}
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        for name, g in grads.items():
            direction = DIRECTIONS[config.name](config, name, memory[name], g * min(1, 3 / norm), t)
            decay = 0 if "scale_D" in name else 0.1
            params[name] -= rate * (direction + decay * params[name])
    return params


def adam(config, name, memory, g, t):
    memory["m"] = config.beta1 * memory["m"] + (1 - config.beta1) * g
    memory["v"] = config.beta2 * memory["v"] + (1 - config.beta2) * g**2
    m, v = memory["m"] / (1 - config.beta1**t), memory["v"] / (1 - config.beta2**t)
    return m / (np.sqrt(v) + config.epsilon)


def adafactor(config, name, memory, g, t):
    decay = min(1 - t**-0.8, config.beta2)
    over_rows, over_columns = row_axes(SPECS[name]), column_axes(SPECS[name])
    if over_rows:
        # As Shazeer & Stern have it: sums of rows and of columns, over the sum of all.
        memory["r"] = decay * memory.get("r", 0) + (1 - decay) * (g**2).sum(
            over_columns, keepdims=True
        )
        memory["c"] = decay * memory.get("c", 0) + (1 - decay) * (g**2).sum(
            over_rows, keepdims=True
        )
        v = memory["r"] * memory["c"] / memory["r"].sum(over_rows, keepdims=True)
    else:
        memory["v"] = v = decay * memory["v"] + (1 - decay) * g**2
    memory["m"] = config.beta1 * memory["m"] + (1 - config.beta1) * g / np.sqrt(v)
    return memory["m"]


def lion(config, name, memory, g, t):
    direction = np.sign(config.beta1 * memory["m"] + (1 - config.beta1) * g)
    memory["m"] = config.beta2 * memory["m"] + (1 - config.beta2) * g
    return direction


def muon(config, name, memory, g, t):
    if not SPECS[name].is_matmul:
        return adam(config, name, memory, g, t)
    memory["m"] = config.muon_momentum * memory["m"] + g
    x = config.muon_momentum * memory["m"] + g
    x = x.reshape(-1, SPECS[name].contract_size, SPECS[name].output_size)
    out = []
    for matrix in x:
        # The same polynomial, on singular values.
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        s = s / np.sqrt((s**2).sum())
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        out.append(0.2 * math.sqrt(max(matrix.shape)) * (u * s) @ vt)
    return np.stack(out).reshape(g.shape)


DIRECTIONS = {"adamw": adam, "adafactor": adafactor, "lion": lion, "muon": muon}


@functools.cache
def after_two_updates(name: str, on_mesh: bool, dtype: str = "float32"):
    """Parameters and optimizer state, as they come out of two compiled updates."""
    config = run_config(name=name, moments_dtype=dtype)
    optimizer = make_optimizer(config)
    mesh = sharding.make_mesh(2, 2, 2) if on_mesh else None
    params = from_arrays(MODEL_CONFIG, arrays(0), mesh)
    update = jax.jit(
        lambda grads, state, params: jax.tree.map(
            lambda leaf: leaf, optimizer.update(grads, state, params)
        )
    )
    with jax.set_mesh(mesh) if mesh else jax.default_device(jax.devices()[0]):
        state = jax.jit(optimizer.init)(params)
        for t in (1, 2):
            updates, state = update(from_arrays(MODEL_CONFIG, arrays(t), mesh), state, params)
            params = jax.tree.map(jnp.add, params, updates)
    return params, state


@pytest.mark.parametrize("on_mesh", [False, True], ids=["one device", "mesh"])
@each_optimizer
def test_updates_are_those_of_the_papers(name, on_mesh):
    params, _ = after_two_updates(name, on_mesh)
    config = run_config(name=name).optimizer
    right = oracle(config, [0.005, 0.01])
    for tensor, actual in to_arrays(params).items():
        # Parameters are of size 1 and move by about 0.01.
        np.testing.assert_allclose(actual, right[tensor], rtol=0, atol=2e-6, err_msg=tensor)


@each_optimizer
def test_moments_lie_where_their_parameters_do(name):
    params, state = after_two_updates(name, on_mesh=True)
    tensors = to_arrays(params)
    moments = [
        (name_in(path), leaf) for path, leaf in jax.tree.leaves_with_path(state) if leaf.ndim
    ]
    assert {tensor for tensor, _ in moments} == tensors.keys()
    for tensor, moment in moments:
        if moment.shape == tensors[tensor].shape:
            assert moment.sharding == tensors[tensor].sharding, tensor


def test_factors_are_split_as_the_matrix_is():
    factors = after_two_updates("adafactor", on_mesh=True)[1][1][0]
    rows, columns = to_arrays(factors.rows), to_arrays(factors.columns)
    for tensor, shape, spec, column_shape, column_spec in [
        ("embed/table_VD", (32,), P(("tensor", "data", "expert")), (16,), P(None)),
        (
            "layers/attention/w_query_DNH",
            (2, 16),
            P(None, "data"),
            (2, 4, 8),
            P(None, ("tensor", "expert"), None),
        ),
        (
            "layers/moe/w_down_EFD",
            (2, 8, 24),
            P(None, None, ("expert", "tensor")),
            (2, 8, 16),
            P(None, None, "data"),
        ),
    ]:
        assert (rows[tensor].shape, rows[tensor].sharding.spec) == (shape, spec)
        moment = columns[tensor]
        assert (moment.shape, moment.sharding.spec) == (column_shape, column_spec)
    assert "layers/moe/router_DE" not in columns
    assert rows["layers/moe/router_DE"].shape == (2, 16, 8)


@each_optimizer
def test_saved_and_read_again_every_bit_is_the_same(name, tmp_path):
    config, mesh = run_config(name=name, ema_decay=0.9), sharding.make_mesh(2, 2, 2)
    params, opt_state = after_two_updates(name, on_mesh=True)
    with jax.set_mesh(mesh):
        guard = jax.device_put(Guard(jnp.int32(1), jnp.int32(2), jnp.float32(0.3)), P())
        state = TrainState(jax.device_put(jnp.int32(4), P()), params, opt_state, guard, params)
    abstract_trees = abstract_state(config, make_optimizer(config), mesh)
    checkpoints = Checkpoints(tmp_path, RetentionPolicy(1))
    checkpoints.save(4, state_trees(state), {})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    read = checkpoints.restore(4, state_trees(abstract_trees))
    checkpoints.close()
    saved = jax.tree.leaves_with_path(state_trees(state))
    for (path, before), after in zip(saved, jax.tree.leaves(read), strict=True):
        where = jax.tree_util.keystr(path)
        assert before.sharding.is_equivalent_to(after.sharding, before.ndim), where
        np.testing.assert_array_equal(before, after, err_msg=where)


def name_in(path) -> str:
    """The tensor that a moment belongs to: the attributes at the end of its path."""
    keys = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    start = next(i for i, key in enumerate(keys) if key in ("embed", "layers", "final_norm"))
    return "/".join(key for key in keys[start:] if key != "value")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moments_have_the_type_of_the_config_whatever_the_parameters_have(dtype):
    model = dataclasses.replace(MODEL_CONFIG, param_dtype="bfloat16")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    for name in NAMES:
        config = dataclasses.replace(run_config(name=name, moments_dtype=dtype), model=model)
        state = abstract_state(config, make_optimizer(config), mesh)
        assert {leaf.dtype for leaf in jax.tree.leaves(state.model)} == {jnp.dtype("bfloat16")}
        moments = {leaf.dtype for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim}
        factors = {jnp.dtype("float32")} if name == "adafactor" else set()
        assert moments == {jnp.dtype(dtype)} | factors


def test_kept_in_bfloat16_a_moment_is_rounded_after_it_was_used():
    plain, stored = (
        optax.ema(0.9, debias=False),
        keep_moments_in("bfloat16", optax.ema(0.9, debias=False)),
    )
    grads = {"x": jnp.asarray(arrays(1)["final_norm/scale_D"])}
    updates, state = stored.update(grads, stored.init(grads))
    right, right_state = plain.update(grads, plain.init(grads))
    np.testing.assert_array_equal(updates["x"], right["x"])
    np.testing.assert_array_equal(state.ema["x"], right_state.ema["x"].astype(jnp.bfloat16))


def test_newton_schulz_brings_singular_values_near_one():
    x_RC = np.random.default_rng(3).normal(size=(24, 16)).astype("f4")
    for matrix in (x_RC, x_RC.T, 1e-6 * x_RC):
        values = np.linalg.svd(orthogonalize(jnp.asarray(matrix)), compute_uv=False)
        assert 0.65 < values.min() < values.max() < 1.25


# ---- schedules


def rates(steps: int, **optimizer) -> list[float]:
    rate = make_schedule(OptimizerConfig(peak_lr=1e-3, **optimizer), steps)
    return [float(rate(step)) for step in range(steps + 1)]


def test_cosine_rises_to_the_peak_and_falls_to_its_last_share():
    rate = rates(104, warmup_steps=4, min_lr_ratio=0.1)
    assert rate[:5] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3])
    assert max(rate) == rate[4]
    assert rate[54] == pytest.approx(5.5e-4)  # half-way down the cosine: the mean of both ends
    assert rate[104] == pytest.approx(1e-4)


def test_without_warm_up_the_first_step_has_the_peak_rate():
    assert rates(10, warmup_steps=0)[0] == pytest.approx(1e-3)


def test_the_other_schedules():
    warm = [5e-4, 1e-3]
    linear = rates(5, warmup_steps=1, schedule="linear", min_lr_ratio=0.2)
    assert linear == pytest.approx([*warm, 8e-4, 6e-4, 4e-4, 2e-4])
    assert rates(4, warmup_steps=1, schedule="constant") == pytest.approx([*warm, 1e-3, 1e-3, 1e-3])
    wsd = rates(6, warmup_steps=1, schedule="wsd", decay_steps=2, min_lr_ratio=0)
    assert wsd == pytest.approx([*warm, 1e-3, 1e-3, 1e-3, 5e-4, 0])


# ---- groups


def test_groups_scale_and_decay_their_tensors_and_the_first_match_counts():
    groups = (
        ParamGroup(match="layers/moe/router_DE", lr_scale=0.5, weight_decay=0.0),
        ParamGroup(match="layers/moe/*", lr_scale=2.0),
        ParamGroup(match="final_norm/*", weight_decay=1.0),
    )
    before, after = (updates_of(run_config(param_groups=groups)) for groups in ((), groups))
    for tensor in before:
        rate, param, actual = 5e-3, arrays(0)[tensor], after[tensor]
        right = before[tensor]
        if tensor == "layers/moe/router_DE":
            right = (right + rate * 0.1 * param) * 0.5
        elif tensor.startswith("layers/moe/"):
            right = right * 2
        elif tensor == "final_norm/scale_D":
            right = right - rate * param
        np.testing.assert_allclose(actual, right, rtol=1e-5, atol=1e-8, err_msg=tensor)
        if "scale_D" in tensor and tensor.startswith("layers"):
            assert np.abs(actual).max() == pytest.approx(rate, rel=1e-3)  # Adam's first, no decay


def updates_of(config: RunConfig) -> dict[str, np.ndarray]:
    """The first updates."""
    optimizer = make_optimizer(config)
    params, grads = (from_arrays(MODEL_CONFIG, arrays(seed)) for seed in (0, 1))
    updates, _ = jax.jit(lambda: optimizer.update(grads, optimizer.init(params), params))()
    return jax.tree.map(np.asarray, to_arrays(updates))


@pytest.mark.parametrize(
    ("matches", "sentence"),
    [
        (
            ["*rooter*"],
            r"groups has \*rooter\*, which matches no tensor; there are embed/table_VD, ",
        ),
        (
            ["layers/*", "*router*"],
            r"has \*router\*, which matches only what groups before it match",
        ),
        (
            ["*"],
            r"freezes every tensor, and nothing is left to train; .* layers/moe/\*, would work",
        ),
    ],
)
def test_groups_that_cannot_be_meant_are_refused(matches, sentence):
    groups = tuple(ParamGroup(match=match, frozen=True) for match in matches)
    with pytest.raises(ConfigError, match=sentence):
        make_optimizer(run_config(param_groups=groups))


def test_every_tensor_is_reported_in_some_group():
    named = (ParamGroup(match="*w_out*", name="out"), ParamGroup(match="*w_key*"))
    config = run_config(param_groups=named).optimizer
    groups = {tensor: metric_group(config, spec) for tensor, spec in SPECS.items()}
    assert {name: groups.pop(f"layers/attention/w_{name}") for name in ("out_NHD", "key_DKH")} == {
        "out_NHD": "out",
        "key_DKH": "attention",
    }
    assert groups["embed/table_VD"] == "embed"
    assert groups["layers/moe/router_DE"] == "router"
    assert groups["layers/moe/w_up_EDF"] == "experts"
    assert groups["layers/pre_ffn_norm/scale_D"] == groups["final_norm/scale_D"] == "norms"


@pytest.mark.parametrize("rank", [0, 2], ids=["no adapters", "adapters"])
def test_every_tensor_of_a_model_has_a_group_in_metrics(rank):
    config = run_config()
    train = dataclasses.replace(config.train, init_from="weights")
    config = dataclasses.replace(config, train=train, lora=LoraConfig(rank=rank))
    state = abstract_state(config, make_optimizer(config), sharding.make_mesh(2, 2, 2))
    specs = tensor_specs(config.model, config.lora)
    groups = {name: metric_group(config.optimizer, specs[name]) for name in names(state.model)}
    assert set(groups.values()) == {"embed", "attention", "experts", "router", "norms"}, groups


def test_every_optimizer_of_the_config_has_its_row():
    assert set(optimizer.DIRECTIONS) == set(MOMENTS) == set(DIRECTIONS) == set(NAMES)


def test_frozen_tensors_have_no_moments():
    config = run_config(param_groups=(ParamGroup(match="layers/attention/*", frozen=True),))
    state = abstract_state(config, make_optimizer(config), sharding.make_mesh(2, 2, 2))
    moments = {name_in(p) for p, leaf in jax.tree.leaves_with_path(state.opt_state) if leaf.ndim}
    assert moments == {name for name in names(state.model) if "attention" not in name}
