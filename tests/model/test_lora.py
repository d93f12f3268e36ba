"""Adapters beside frozen matrices: nothing at first, then what the sum of both would be.

Letters: B rows, T tokens.
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grok
from grok.config import (
    AttentionConfig,
    DataConfig,
    LoraConfig,
    ModelConfig,
    MoEConfig,
    RunConfig,
    TrainConfig,
)
from grok.errors import ConfigError
from grok.model.build import from_arrays, to_arrays
from grok.model.decoder import Decoder
from grok.model.lora import adapted
from grok.model.params import is_adapter, param_specs, tensor_specs
from grok.ops.moe.experts_xla import experts_reference, experts_xla
from grok.ops.weights.lora import LoraArray, merge_adapter
from grok.optim.param_groups import partition, trainable
from grok.train.step import gradients
from grok.weights import cast
from grok.weights.cast import converted
from grok.weights.load import put_on_mesh
from tests.fixtures.random_weights import RandomSource

CONFIG = ModelConfig(
    vocab_size=64,
    num_layers=2,
    embed_dim=16,
    moe=MoEConfig(dim=24, num_experts=4),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4),
    compute_dtype="float32",
    remat="none",
)
LORA = LoraConfig(rank=3, alpha=6.0, targets=("query", "key", "value", "out", "gate", "up", "down"))
TOKENS = np.random.default_rng(0).integers(1, 64, (8, 16))
each_mesh = pytest.mark.parametrize("sizes", [None, (2, 2, 2)], ids=str)


def base_model(sizes) -> Decoder:
    return put_on_mesh(RandomSource(CONFIG, dtype="float32"), sizes and grok.make_mesh(*sizes))


@functools.cache
def fresh(sizes) -> Decoder:
    """The base with adapters as a run begins with them."""
    base = base_model(sizes)
    with jax.set_mesh(grok.make_mesh(*sizes)) if sizes else contextlib.nullcontext():
        return jax.jit(lambda base: adapted(base, LORA, jax.random.key(1)))(base)


@functools.cache
def trained(sizes) -> Decoder:
    """The same with adapters that add something."""
    random, model = np.random.default_rng(1), fresh(sizes)

    def noise(name: str, leaf: jax.Array) -> jax.Array:
        values = 0.3 * random.standard_normal(leaf.shape, np.float32)
        return jax.device_put(values, leaf.sharding) if name.endswith("/b") else leaf

    leaves = [noise(name, leaf) for name, leaf in to_arrays(model).items()]
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


def merged_model(model: Decoder) -> Decoder:
    """A plain model of the same function."""
    parts = {name: np.asarray(array) for name, array in to_arrays(model).items()}
    arrays = {}
    for name, array in parts.items():
        matrix, _, part = name.rpartition("/")
        if part == "base":
            spec = param_specs(CONFIG)[matrix]
            w = LoraArray(array, parts[f"{matrix}/a"], parts[f"{matrix}/b"], LORA.scale)
            arrays[matrix] = merge_adapter(w, spec.contract_dims, spec.output_dims)
        elif not is_adapter(CONFIG, name):
            arrays[name] = array
    return from_arrays(CONFIG, arrays)


@each_mesh
def test_fresh_adapters_change_no_bit(sizes):
    expected = np.asarray(base_model(sizes)(TOKENS))
    np.testing.assert_array_equal(fresh(sizes)(TOKENS), expected)


@each_mesh
def test_adapters_do_what_the_merged_weights_do(sizes):
    model = trained(sizes)
    ours, expected = np.asarray(model(TOKENS)), np.asarray(merged_model(model)(TOKENS))
    change = np.abs(expected - np.asarray(base_model(None)(TOKENS))).max()
    error = np.abs(ours - expected).max() / np.abs(expected).max()
    print(f"\n{sizes}: {error:.1e} from merged, which are {change:.2f} from the base")
    assert change > 0.5
    assert error < 1e-5


def test_gradients_of_experts_are_those_through_the_merged_weights():
    random = np.random.default_rng(2)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape, np.float32))

    R, C, E, D, F, r = 24, 2, 4, 8, 12, 3
    x_RD, topk_weights_RC, dy_RD = draw(R, D), draw(R, C), draw(R, D)
    expert_ids_RC = jnp.asarray(random.integers(0, E, (R, C)), jnp.int32)
    bases = draw(E, D, F), draw(E, D, F), draw(E, F, D)
    factors = [(draw(E, *w.shape[1:2], r), draw(E, r, *w.shape[2:])) for w in bases]

    def beside(x_RD, topk_weights_RC, factors):
        weights = [LoraArray(w, a, b) for w, (a, b) in zip(bases, factors, strict=True)]
        return experts_xla(x_RD, topk_weights_RC, expert_ids_RC, *weights, 8)

    def inside(x_RD, topk_weights_RC, factors):
        weights = [
            merge_adapter(LoraArray(w, a, b), 1, 1)
            for w, (a, b) in zip(bases, factors, strict=True)
        ]
        return experts_reference(x_RD, topk_weights_RC, expert_ids_RC, *weights)

    def gradients(form):
        return jax.jit(jax.grad(lambda *args: jnp.sum(form(*args) * dy_RD), argnums=(0, 1, 2)))(
            x_RD, topk_weights_RC, factors
        )

    ours, expected = (jax.tree.leaves(gradients(form)) for form in (beside, inside))
    assert len(ours) == 8
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [pytest.param("int8", None, marks=pytest.mark.prove), ("int4", (2, 2, 2))],
    ids=str,
)
def test_adapters_below_which_weights_are_quantised(dtype, sizes, monkeypatch):
    """Loss and gradients are those of the same weights as floats, and the matrices stay integers;
    of the experts, two have adapters and one has none."""
    monkeypatch.setattr(cast, "INT4_GROUP", 8)
    quantized = converted(RandomSource(CONFIG, dtype="float32"), dtype)
    mesh = grok.make_mesh(*sizes) if sizes else grok.make_mesh()
    lora = dataclasses.replace(LORA, targets=("query", "out", "up", "down"))
    tokens = jnp.asarray(TOKENS, jnp.int32)
    batch = {"tokens_BT": tokens, "targets_BT": tokens, "mask_BT": jnp.ones((8, 16))}

    def loss_and_gradients(source, dtype):
        model_config = dataclasses.replace(CONFIG, param_dtype=dtype)
        train = TrainConfig(init_from="weights")
        data = DataConfig(sequence_length=16)
        config = RunConfig(model=model_config, lora=lora, train=train, data=data)
        with jax.set_mesh(mesh):
            model = put_on_mesh(source, mesh)
            model = jax.jit(lambda base: adapted(base, lora, jax.random.key(1)))(model)
            params, frozen = partition(model, trainable(config))
            params = jax.tree.map(
                lambda w: w + 0.1 * jnp.cos(jnp.arange(w.size)).reshape(w.shape), params
            )
            loss, _, grads = jax.jit(functools.partial(gradients, config=train))(
                params, frozen, batch
            )
        return frozen, {"loss": loss} | to_arrays(grads)

    frozen, ours = loss_and_gradients(quantized, dtype)
    _, expected = loss_and_gradients(converted(quantized, "float32"), "float32")
    kinds = {name: array.dtype.name for name, array in to_arrays(frozen).items()}
    for name in ("w_gate_EDF/base", "w_up_EDF/base"):
        assert kinds[f"layers/moe/{name}/values"] == dtype
    assert kinds["layers/attention/w_key_DKH/values"] == "int8"
    assert ours.keys() == expected.keys() and len(ours) == 9
    for name, value in expected.items():
        error = np.abs(np.asarray(ours[name]) - np.asarray(value)).max()
        assert error <= 2e-5 * np.abs(np.asarray(value)).max(), name


def test_tensors_have_the_names_that_configs_match():
    assert sorted(tensor_specs(CONFIG, LORA)) == sorted(to_arrays(fresh(None)))
    assert list(tensor_specs(CONFIG, LoraConfig())) == list(param_specs(CONFIG))


def test_factors_are_split_as_rows_and_columns_are():
    model = fresh((2, 2, 2))
    part = {
        name: array.sharding.shard_shape(array.shape) for name, array in to_arrays(model).items()
    }
    # 16 of embed over data, 4 heads over expert and tensor; 2 kv heads over tensor, embed the rest.
    assert part["layers/attention/w_query_DNH/a"] == (2, 8, 3)
    assert part["layers/attention/w_query_DNH/b"] == (2, 3, 1, 4)
    assert part["layers/attention/w_key_DKH/a"] == (2, 4, 3)
    assert part["layers/attention/w_key_DKH/b"] == (2, 3, 1, 4)
    assert part["layers/attention/w_out_NHD/a"] == (2, 1, 4, 3)
    assert part["layers/attention/w_out_NHD/b"] == (2, 3, 8)
    # 24 of mlp over expert and tensor, of each of 4 experts; their embed is over data alone.
    assert part["layers/moe/w_gate_EDF/a"] == (2, 4, 8, 3)
    assert part["layers/moe/w_gate_EDF/b"] == (2, 4, 3, 6)
    assert part["layers/moe/w_down_EFD/a"] == (2, 4, 6, 3)
    assert part["layers/moe/w_down_EFD/b"] == (2, 4, 3, 8)


def test_a_target_that_is_no_matrix_is_refused():
    wrong = LoraConfig(rank=2, targets=("query", "gates"))
    with pytest.raises(
        ConfigError, match=r"lora.targets has gates, .* it has query, key, value, out"
    ):
        tensor_specs(CONFIG, wrong)
