"""The same model on every mesh of eight devices: values, losses, gradients, and where they lie.

Letters: B rows, T tokens, V vocab.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import grok
from grok import sharding
from grok.config import MESH_AXES, AttentionConfig, ModelConfig, MoEConfig, TrainConfig
from grok.errors import ConfigError
from grok.model.build import from_arrays, to_arrays
from grok.model.param_spec import ParamSpec
from grok.train.loss import batch_loss
from tests.fixtures.models import replace_keys
from tests.fixtures.prove import in_suite

# Two kv heads: split at tensor=2, and each on two devices at tensor=4.
CONFIG = ModelConfig(
    vocab_size=96,
    num_layers=2,
    embed_dim=32,
    moe=MoEConfig(dim=24),
    attention=AttentionConfig(num_heads=8, num_kv_heads=2, head_dim=8),
    compute_dtype="float32",
)
LOSSES = TrainConfig(z_loss=1e-4, router_balance_loss=0.01)
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Other feed-forward parts, heads and attention than those of CONFIG.
ARCHITECTURES = {
    "mlp": {"mlp.dim": 48, "moe": None, "norm.sandwich": False},
    "mlp and experts": {"mlp.dim": 48, "moe.logit_softcap": 3.0, "mlp.activation": "gelu"},
    "window and temperature": {"attention.window": 5, "attention.temperature_length": 4},
    "scaled rope": {"attention.rope.scaling": SCALING | {"original_context_length": 32}},
    "own head": {"tie_embeddings": False, "logit_softcap": 2.0, "moe.normalize": True},
}
# Data, expert, tensor, slice: those that split every axis, and in `make prove` all others.
SIZES = [(2, 2, 2, 1), (2, 1, 2, 2)]
MORE_SIZES = [(8, 1, 1, 1), (1, 8, 1, 1), (4, 1, 2, 1), (1, 4, 2, 1), (1, 2, 4, 1), (2, 1, 4, 1)]
each_mesh = pytest.mark.parametrize("sizes", in_suite([*SIZES, *MORE_SIZES], *SIZES), ids=str)

# A gradient sums over the 128 tokens of the batch and over every path through two layers; each
# mesh sums in an order of its own, and each order is off by some units of 2^-24 = 6e-8.
TOLERANCE = 5e-6


@functools.cache
def parameters(config: ModelConfig = CONFIG) -> dict[str, np.ndarray]:
    return jax.tree.map(np.asarray, to_arrays(grok.init(config, jax.random.key(7))))


def model(sizes: tuple[int, ...] | None, config: ModelConfig = CONFIG) -> grok.Grok:
    arrays = parameters(dataclasses.replace(config, remat="full"))
    return from_arrays(config, arrays, sizes and grok.make_mesh(*sizes))


def batch(mesh: jax.sharding.Mesh | None) -> dict[str, jax.Array]:
    """8 rows of 16 random tokens, the last of some rows not counted."""
    keys = jax.random.split(jax.random.key(8), 2)
    tokens_BT, targets_BT = (jax.random.randint(key, (8, 16), 0, CONFIG.vocab_size) for key in keys)
    mask_BT = (jnp.arange(16)[None, :] < jnp.arange(9, 17)[:, None]).astype(jnp.float32)
    arrays = {"tokens_BT": tokens_BT, "targets_BT": targets_BT, "mask_BT": mask_BT}
    rows = mesh and NamedSharding(mesh, sharding.spec("batch", "length"))
    return jax.device_put(arrays, rows)


@functools.cache
def loss_and_gradients(
    sizes: tuple[int, ...] | None, config: ModelConfig = CONFIG
) -> tuple[dict, dict[str, np.ndarray]]:
    losses = LOSSES if config.moe else TrainConfig(z_loss=1e-4)
    run = jax.jit(jax.value_and_grad(batch_loss, has_aux=True), static_argnums=2)
    mesh = sizes and grok.make_mesh(*sizes)
    (loss, report), gradients = run(model(sizes, config), batch(mesh), losses)
    values = {"total": loss, **report}
    return jax.tree.map(np.asarray, values), jax.tree.map(np.asarray, to_arrays(gradients))


@each_mesh
def test_losses_and_gradients_are_those_of_one_device(sizes):
    assert_equal_on_one_device(sizes, CONFIG)


@pytest.mark.parametrize("sizes", [(2, 2, 2, 1)], ids=str)
@pytest.mark.parametrize(
    "name", in_suite(ARCHITECTURES, "mlp and experts", "window and temperature")
)
def test_so_are_those_of_other_architectures(name, sizes):
    assert_equal_on_one_device(sizes, replace_keys(CONFIG, ARCHITECTURES[name]))


def assert_equal_on_one_device(sizes: tuple[int, ...], config: ModelConfig) -> None:
    losses, ours = loss_and_gradients(sizes, config)
    right_losses, right = loss_and_gradients(None, config)
    actual, expected = losses | ours, right_losses | right
    differences = {
        name: np.abs(actual[name] - expected[name]).max() / np.abs(expected[name]).max()
        for name in expected
    }
    worst = max(differences, key=differences.get)
    print(f"\n{sizes}: loss {differences['total']:.1e}, worst {worst} {differences[worst]:.1e}")
    assert differences[worst] < TOLERANCE


# Who holds which part of every parameter, written out again beside the rules. There are heads for
# expert x tensor, and kv heads for tensor alone.
HEADS = ("tensor", "expert")
SPECS = {
    "embed/table_VD": P(("tensor", "data", "expert"), None),
    "final_norm/scale_D": P(None),
    "layers/attention/w_query_DNH": P(None, "data", HEADS, None),
    "layers/attention/w_key_DKH": P(None, ("data", "expert"), "tensor", None),
    "layers/attention/w_value_DKH": P(None, ("data", "expert"), "tensor", None),
    "layers/attention/w_out_NHD": P(None, HEADS, None, "data"),
    "layers/moe/router_DE": P(None, None, None),
    "layers/moe/w_gate_EDF": P(None, None, "data", ("expert", "tensor")),
    "layers/moe/w_up_EDF": P(None, None, "data", ("expert", "tensor")),
    "layers/moe/w_down_EFD": P(None, None, ("expert", "tensor"), "data"),
    "layers/pre_attn_norm/scale_D": P(None, None),
    "layers/post_attn_norm/scale_D": P(None, None),
    "layers/pre_ffn_norm/scale_D": P(None, None),
    "layers/post_ffn_norm/scale_D": P(None, None),
}


def test_parameters_lie_where_they_should():
    arrays = to_arrays(model((2, 2, 2, 1)))
    assert {name: array.sharding.spec for name, array in arrays.items()} == SPECS
    for name, array in arrays.items():
        num_shards = 8 if "w_" in name or "table" in name else 1
        assert {part.data.size for part in array.addressable_shards} == {array.size // num_shards}


def test_gradients_lie_where_their_parameters_do():
    gradients = jax.eval_shape(
        jax.grad(lambda m, b: batch_loss(m, b, LOSSES)[0]),
        model((2, 2, 2, 1)),
        batch(grok.make_mesh(2, 2, 2)),
    )
    assert {name: leaf.sharding.spec for name, leaf in to_arrays(gradients).items()} == SPECS


def test_fresh_parameters_are_the_same_on_a_mesh():
    initialised = to_arrays(grok.init(CONFIG, jax.random.key(7), grok.make_mesh(2, 2, 2)))
    assert {name: array.sharding.spec for name, array in initialised.items()} == SPECS
    for name, array in initialised.items():
        np.testing.assert_array_equal(array, parameters()[name], err_msg=name)


def test_a_device_draws_only_its_own_part_of_a_parameter():
    def draw(key):
        spec = ParamSpec.matmul((8, 64, 64), ("experts", "embed", "mlp"), 1, 1).stacked(2)
        return spec.initialize(key, "float32", "float32")

    with jax.set_mesh(grok.make_mesh(2, 2, 2)):
        memory = jax.jit(draw).lower(jax.random.key(0)).compile().memory_analysis()
    total_bytes = 2 * 8 * 64 * 64 * 4
    assert memory.output_size_in_bytes == total_bytes // 8
    assert memory.temp_size_in_bytes < total_bytes / 2


def test_kv_heads_too_few_to_split_are_on_every_device():
    key = to_arrays(model((2, 1, 4, 1)))["layers/attention/w_key_DKH"]
    assert key.sharding.spec == P(None, ("data", "expert"), None, None)


def test_logits_are_split_over_rows_and_vocabulary():
    logits = jax.eval_shape(model((2, 2, 2, 1)), np.zeros((8, 16), np.int32))
    assert logits.sharding.spec == P(("slice", "data", "expert"), None, "tensor")


def test_a_mesh_that_the_model_does_not_fit_is_refused():
    config = ModelConfig(
        vocab_size=96,
        num_layers=2,
        embed_dim=32,
        moe=MoEConfig(dim=24),
        attention=AttentionConfig(num_heads=6, num_kv_heads=2, head_dim=8),
    )
    with pytest.raises(
        ConfigError, match=r"model.attention.num_heads=6 .* mesh.tensor=4; mesh .* would"
    ):
        grok.init(config, jax.random.key(0), grok.make_mesh(2, 1, 4))


def test_a_mesh_that_jax_would_split_over_by_itself_is_refused():
    automatic = (jax.sharding.AxisType.Auto,) * 4
    mesh = jax.make_mesh((1, 8, 1, 1), MESH_AXES, axis_types=automatic)
    with pytest.raises(ConfigError, match=r"automatic kind .* grok.make_mesh makes one"):
        grok.init(CONFIG, jax.random.key(0), mesh)


def test_a_mesh_of_other_axes_is_refused():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with pytest.raises(ConfigError, match=r"grok.make_mesh makes one"):
        grok.init(CONFIG, jax.random.key(0), mesh)
