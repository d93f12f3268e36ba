"""Switches of the architecture: each changes the logits, alike in training, prefill and decode."""

import functools

import jax
import numpy as np
import pytest

import grok
from grok.config import ModelConfig
from grok.model.attend import PagedBatch, init_cache
from grok.model.decoder import Decoder
from tests.fixtures.models import model_config, replace_keys
from tests.fixtures.prove import in_suite

CONFIG = model_config(
    {
        "vocab_size": 64,
        "num_layers": 2,
        "embed_dim": 16,
        "attention.num_heads": 4,
        "attention.num_kv_heads": 2,
        "attention.head_dim": 4,
        "attention.logit_softcap": 1.0,
        "moe.dim": 24,
        "moe.num_experts": 4,
        "compute_dtype": "float32",
    }
)
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALING["original_context_length"] = 16
TOKENS = np.random.default_rng(0).integers(1, 64, (4, 12))


@functools.cache
def model(config: ModelConfig) -> Decoder:
    return grok.init(config, jax.random.key(0))


def paged_logits(config: ModelConfig) -> np.ndarray:
    """The same logits from the cache: a prompt of 8 tokens in each of 4 rows, then one by one."""
    decoder, cache = model(config), init_cache(config, 12, 4, "float32")
    pages = np.arange(12, dtype=np.int32).reshape(1, 4, 3)
    parts = []
    for start, count in [(0, 8), (8, 1), (9, 1), (10, 1), (11, 1)]:
        numbers = (np.full((1, 4), n, np.int32) for n in (start, count))
        tokens = TOKENS[:, start : start + count].reshape(1, -1)
        x_BTD, cache, _ = jax.jit(Decoder.step)(decoder, tokens, cache, PagedBatch(pages, *numbers))
        parts.append(np.asarray(decoder.unembed(x_BTD)).reshape(4, count, -1))
    return np.concatenate(parts, axis=1)


SWITCHES = [
    {"norm.sandwich": False},
    {"attention.rope.scaling": SCALING},
    {"attention.temperature_length": 8, "attention.window": 6},
    {"mlp.dim": 24},
    {"mlp.dim": 24, "moe": None},
    {"tie_embeddings": False},
]
MORE_SWITCHES = [
    {"norm.eps": 0.1},
    {"attention.logit_softcap": None},
    {"attention.rope.theta": 100.0},
    {"attention.window": 3},
    {"attention.window": 9},
    {"attention.temperature_length": 2},
    {"moe.activation": "silu"},
    {"moe.logit_softcap": 0.5},
    {"moe.normalize": True, "norm.sandwich": False},
    {"mlp.dim": 24, "mlp.activation": "gelu"},
    {"logit_softcap": 1.0},
]


@pytest.mark.parametrize("keys", in_suite([*SWITCHES, *MORE_SWITCHES], *SWITCHES), ids=str)
def test_a_switch_holds_in_training_and_decoding(keys):
    config = replace_keys(CONFIG, keys)
    full, largest = np.asarray(model(config)(TOKENS)), np.abs(model(CONFIG)(TOKENS)).max()
    assert np.abs(full - model(CONFIG)(TOKENS)).max() > 1e-4 * largest
    np.testing.assert_allclose(paged_logits(config), full, rtol=0, atol=1e-5 * largest)
