"""The dense MLP with each kind of weight: int8, a layer of a stack, adapters; on a mesh too.

Letters: B rows, T tokens, R rows, D embed, F mlp.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grok
import grok.model.mlp
from grok import hardware
from grok.config import LoraConfig
from grok.model.build import from_arrays, to_arrays
from grok.model.lora import adapted
from grok.model.mlp import _one_expert
from grok.model.params import param_specs
from grok.ops.mlp import gated_mlp, gelu
from grok.ops.moe.experts_pallas import experts_pallas
from grok.ops.weights.lora import LoraArray, merge_adapter
from grok.ops.weights.quantized import QuantizedArray, quantize
from grok.weights.cast import converted
from grok.weights.load import put_on_mesh
from tests.fixtures.models import model_config
from tests.fixtures.random_weights import RandomSource

# Both parts, so that the same matrices stand as a dense MLP and as experts.
CONFIG = model_config(
    {
        "vocab_size": 64,
        "num_layers": 2,
        "embed_dim": 16,
        "attention.num_heads": 4,
        "attention.num_kv_heads": 2,
        "attention.head_dim": 4,
        "mlp.dim": 32,
        "moe.dim": 24,
        "moe.num_experts": 4,
        "compute_dtype": "float32",
    }
)
TOKENS = np.random.default_rng(0).integers(1, 64, (8, 12))
MESHES = [None, (2, 2, 2), (1, 4, 2)]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_int8_matrices_give_the_logits_of_their_values(sizes):
    int8 = converted(RandomSource(CONFIG, dtype="float32"), "int8")
    model = put_on_mesh(int8, sizes and grok.make_mesh(*sizes))
    assert model.layers.mlp.w_down_FD.get_value().values.dtype == np.int8
    leaves = {name: np.asarray(leaf) for name, leaf in to_arrays(put_on_mesh(int8, None)).items()}
    floats = {}
    for name, spec in param_specs(CONFIG).items():
        floats[name] = leaves.get(name)
        if floats[name] is None:
            values, scales = leaves[f"{name}/values"], leaves[f"{name}/scales"]
            w = QuantizedArray(values, scales, spec.contract_dims, spec.output_dims)
            floats[name] = w.dequantize("float32")
    expected = np.asarray(from_arrays(CONFIG, floats)(TOKENS))
    error = np.abs(np.asarray(model(TOKENS)) - expected).max() / np.abs(expected).max()
    assert error < 1e-5


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_adapters_do_what_the_merged_weights_do(sizes):
    lora = LoraConfig(rank=3, alpha=6.0, targets=("gate", "up", "down"))
    base = put_on_mesh(RandomSource(CONFIG, dtype="float32"), None)
    arrays = to_arrays(jax.jit(lambda m: adapted(m, lora, jax.random.key(1)))(base))
    random, merged = np.random.default_rng(1), {}
    for name in arrays:
        if name.endswith("/b"):
            arrays[name] = 0.3 * random.standard_normal(arrays[name].shape, np.float32)
    for name, spec in param_specs(CONFIG).items():
        merged[name] = arrays.get(name)
        if merged[name] is None:
            w = LoraArray(*(np.asarray(arrays[f"{name}/{x}"]) for x in ("base", "a", "b")), 2.0)
            merged[name] = merge_adapter(w, spec.contract_dims, spec.output_dims)
    assert "layers/mlp/w_up_DF/a" in arrays and "layers/moe/w_up_EDF/a" in arrays
    expected = np.asarray(from_arrays(CONFIG, merged)(TOKENS))
    mesh = sizes and grok.make_mesh(*sizes)
    model = put_on_mesh(RandomSource(CONFIG, dtype="float32"), mesh)
    with jax.set_mesh(mesh) if mesh else jax.default_device(None):
        model = jax.jit(lambda m: adapted(m, lora, jax.random.key(1)))(model)
        leaves = [
            jax.device_put(arrays[name], leaf.sharding) for name, leaf in to_arrays(model).items()
        ]
    model = jax.tree.unflatten(jax.tree.structure(model), leaves)
    error = np.abs(np.asarray(model(TOKENS)) - expected).max() / np.abs(expected).max()
    assert error < 1e-5


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_int8_rows_where_they_lie_equal_the_plain_product(platform, monkeypatch):
    """Few rows, read in place on CPU, and by the kernels of a TPU, interpreted."""

    def interpreted(*args):
        *arrays, column_major, _, activation = args
        return experts_pallas(*arrays, column_major, True, activation)

    monkeypatch.setattr(hardware, "platform", lambda: platform)
    monkeypatch.setattr(grok.model.mlp, "experts_pallas", interpreted)
    random = np.random.default_rng(2)
    x_RD = random.standard_normal((5, 128), np.float32)
    floats = [random.standard_normal(s, np.float32) / 11 for s in ((128, 256),) * 2 + ((256, 128),)]
    stacks = [quantize(np.stack([w, w[::-1]]), 2) for w in floats]
    weights = [QuantizedArray(*map(jnp.asarray, s), layer=jnp.int32(1)) for s in stacks]
    ours = jax.jit(_one_expert, static_argnums=2)(jnp.asarray(x_RD), weights, "silu")
    plain = [QuantizedArray(s[0][1], s[1][1]).dequantize("float32") for s in stacks]
    expected = gated_mlp(jnp.asarray(x_RD), *map(jnp.asarray, plain), activation="silu")
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * float(np.abs(expected).max()))


def test_gelu_and_its_derivative():
    def right(x):
        return jax.nn.gelu(x, approximate=False)

    x = jnp.linspace(-6, 6, 101)
    np.testing.assert_allclose(gelu(x), right(x), rtol=0, atol=5e-7)
    ours, theirs = (jax.vmap(jax.grad(f))(x) for f in (gelu, right))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-7)
