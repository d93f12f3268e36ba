"""The model as a user meets it: sizes, types, and the ways to call it.

Letters: B rows, T tokens, V vocab.
"""

import contextlib
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import grok
from grok.config import AttentionConfig, ModelConfig, MoEConfig
from grok.config.load import presets
from grok.model import attend
from grok.model.attend import PagedBatch, init_cache
from grok.model.build import from_arrays, to_arrays
from grok.model.decoder import Decoder
from grok.model.params import num_active_parameters, num_parameters
from tests.fixtures.prove import in_suite

CONFIG = ModelConfig(
    vocab_size=48,
    num_layers=2,
    embed_dim=16,
    moe=MoEConfig(dim=24, num_experts=4),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4),
    compute_dtype="float32",
)
PRESETS = sorted(name for name in presets() if name.startswith("grok-"))
TOKENS = np.asarray(jax.random.randint(jax.random.key(1), (4, 12), 0, CONFIG.vocab_size), np.int32)


def abstract(config: ModelConfig) -> Decoder:
    return jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))


@functools.cache
def arrays() -> dict[str, np.ndarray]:
    """Random parameters of CONFIG that bfloat16 holds exactly; norm scales near 1."""
    rng = np.random.default_rng(0)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = rng.standard_normal(shape) * 0.25 + name.endswith("scale_D")
        return values.astype(jnp.bfloat16).astype(np.float32)

    return {name: draw(name, leaf.shape) for name, leaf in to_arrays(abstract(CONFIG)).items()}


def model(**changes) -> Decoder:
    return from_arrays(dataclasses.replace(CONFIG, **changes), arrays())


@functools.cache
def logits() -> np.ndarray:
    return np.asarray(model()(TOKENS))


def test_presets_are_found():
    assert {"grok-1", "grok-10m", "grok-8b"} <= set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_as_many_as_the_config_says(preset):
    config = grok.load_config(preset).model
    leaves = jax.tree.leaves(abstract(config))
    assert sum(leaf.size for leaf in leaves) == num_parameters(config)


def test_grok_1_has_the_parameters_of_the_release():
    config = grok.load_config("grok-1").model
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract(config))) == 315_684_820_992
    assert num_active_parameters(config) == 83_756_587_008


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_logits_are_float32(compute_dtype):
    shape = jax.eval_shape(model(compute_dtype=compute_dtype), TOKENS)
    assert (shape.shape, shape.dtype) == ((4, 12, CONFIG.vocab_size), jnp.float32)


def test_logits_are_summed_in_float32():
    """In bfloat16 they would be bfloat16 values times the float32 output multiplier."""
    c = dataclasses.replace(CONFIG, compute_dtype="bfloat16", logit_multiplier=1.0)
    found = from_arrays(c, arrays())(TOKENS)
    assert jnp.any(found != found.astype(jnp.bfloat16).astype(jnp.float32))


def test_call_takes_numpy_jax_and_lists_eagerly_and_jitted():
    m = model()
    for tokens in (jnp.asarray(TOKENS), TOKENS.astype(np.int64), TOKENS.tolist()):
        np.testing.assert_array_equal(m(tokens), logits())
    jitted = jax.jit(lambda m, tokens: m(tokens))(m, TOKENS)
    np.testing.assert_array_equal(jitted, logits())


@pytest.mark.parametrize("ambient", [True, False])
def test_call_on_a_mesh_needs_no_ambient_mesh_and_accepts_one(ambient):
    mesh = grok.make_mesh(2, 2, 2)
    m = from_arrays(CONFIG, arrays(), mesh)
    with jax.set_mesh(mesh) if ambient else contextlib.nullcontext():
        found = m(TOKENS)
    assert found.sharding.spec == P(("slice", "data", "expert"), None, "tensor")
    # Sums of some dozens of products in another order.
    np.testing.assert_allclose(found, logits(), rtol=0, atol=2e-6 * np.abs(logits()).max())


def test_default_segments_and_positions_are_one_row_counted_from_0():
    positions = np.tile(np.arange(12)[None], (4, 1))
    found = model()(TOKENS, segment_ids=np.ones_like(TOKENS), positions=positions)
    np.testing.assert_array_equal(found, logits())


def test_a_later_token_changes_nothing_before_it():
    changed = TOKENS.copy()
    changed[:, 7] = (changed[:, 7] + 1) % CONFIG.vocab_size
    found = np.asarray(model()(changed))
    np.testing.assert_array_equal(found[:, :7], logits()[:, :7])
    assert (found[:, 7:] != logits()[:, 7:]).any(axis=-1).all()


def test_packed_documents_do_not_see_each_other():
    """Two documents in a row, each with positions from 0, are what each is alone."""
    segments = np.where(np.arange(12) < 5, 1, 2)[None].repeat(4, 0)
    positions = np.where(np.arange(12) < 5, np.arange(12), np.arange(12) - 5)[None].repeat(4, 0)
    packed = np.asarray(model()(TOKENS, segments, positions))
    other_first = TOKENS.copy()
    other_first[:, :5] = (other_first[:, :5] + 1) % CONFIG.vocab_size
    again = np.asarray(model()(other_first, segments, positions))
    np.testing.assert_array_equal(again[:, 5:], packed[:, 5:])
    # The same sums, over keys that lie elsewhere in the row.
    alone = np.asarray(model()(np.roll(TOKENS, -5, axis=1)))[:, :7]
    np.testing.assert_allclose(packed[:, 5:], alone, rtol=0, atol=2e-6 * np.abs(alone).max())


@functools.cache
def gradients(remat: str) -> dict[str, np.ndarray]:
    def loss(m):
        return jnp.mean(jax.nn.logsumexp(m(TOKENS), axis=-1))

    return jax.tree.map(np.asarray, to_arrays(jax.jit(jax.grad(loss))(model(remat=remat))))


@pytest.mark.parametrize(
    "remat",
    in_suite(
        ["dots", "selective", "attention", "experts", "offload", "full"],
        *("selective", "experts", "offload"),
    ),
)
def test_what_is_recomputed_does_not_change_gradients(remat):
    for name, expected in gradients("none").items():
        # The same operations, which the compiler may fuse, and so round, otherwise.
        error = np.abs(gradients(remat)[name] - expected).max() / np.abs(expected).max()
        assert error < 2e-6, name


def test_remat_holds_less_between_forward_and_backward():
    def saved(remat: str) -> int:
        m = model(remat=remat)
        _, pull = jax.eval_shape(lambda m: jax.vjp(lambda m: m.hidden(TOKENS)[0], m), m)
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    assert saved("full") < saved("attention") < saved("dots") < saved("none")
    assert saved("full") < saved("experts") < saved("dots")
    assert max(saved("attention"), saved("experts")) < saved("selective") < saved("none")


def saved_arrays(m: Decoder, tokens) -> list[jax.core.ShapedArray]:
    """What the forward pass leaves for the backward pass."""
    return jax.make_jaxpr(lambda m: jax.vjp(lambda m: m.hidden(tokens)[0], m)[1])(m).out_avals


def test_offload_leaves_what_blocks_keep_to_the_hosts():
    """Of each layer its input, (L, B, T, D), and what attention, (L, B, T, N, H), and the experts,
    (L, B, T, D), gave."""
    saved = saved_arrays(model(remat="offload"), TOKENS)
    of_layers = (CONFIG.num_layers, *TOKENS.shape)
    heads = CONFIG.attention.num_heads, CONFIG.attention.head_dim
    kept = [array for array in saved if array.shape[: len(of_layers)] == of_layers]
    shapes = sorted(array.shape for array in kept if array.memory_space == jax.memory.Space.Host)
    assert shapes == sorted([(*of_layers, CONFIG.embed_dim)] * 2 + [(*of_layers, *heads)])


@pytest.mark.parametrize("temperature_length", [None, 64])
def test_tpus_save_what_attention_gave_once(temperature_length, monkeypatch):
    """As the kernel gave it, (L, B, N, T, H) or (L, B, K, G, T, H), and the logarithms of sums."""
    monkeypatch.setattr(attend, "hardware", types.SimpleNamespace(platform=lambda: "tpu"))
    terms = {"head_dim": 128, "temperature_length": temperature_length}
    attention = dataclasses.replace(CONFIG.attention, **terms)
    m = abstract(dataclasses.replace(CONFIG, attention=attention, remat="attention"))
    tokens = np.zeros((2, 256), np.int32)
    sums = CONFIG.num_layers * tokens.size * attention.num_heads
    sizes = [array.size for array in saved_arrays(m, tokens)]
    assert (sizes.count(sums * 128), sizes.count(sums)) == (1, 1)


def test_parameters_in_bfloat16_compute_what_their_values_would_in_float32():
    half = model(param_dtype="bfloat16", compute_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    full = model(param_dtype="float32", compute_dtype="bfloat16")
    np.testing.assert_array_equal(half(TOKENS), full(TOKENS))


def test_a_decoding_step_copies_neither_experts_nor_cache():
    config = dataclasses.replace(CONFIG, embed_dim=64, moe=dataclasses.replace(CONFIG.moe, dim=512))
    step = jax.jit(Decoder.step, donate_argnums=2)
    cache = jax.eval_shape(lambda: init_cache(config, 512, 16, "float32"))
    row = np.zeros((1, 1), np.int32)
    places = PagedBatch(np.zeros((1, 1, 8), np.int32), row, row + 1)
    used = step.lower(abstract(config), row, cache, places).compile().memory_analysis()
    (pages,) = jax.tree.leaves(cache)
    assert used.alias_size_in_bytes == pages.size * 4
    layer = 3 * config.moe.num_experts * config.embed_dim * config.moe.dim * 4
    assert used.temp_size_in_bytes < min(layer / config.moe.num_experts, pages.size * 4)
