"""FLOPs of the model, counted by hand and as published."""

import dataclasses

import pytest

from grok.config import AttentionConfig, ModelConfig, MoEConfig
from grok.config.load import load_config
from grok.model.flops import decode_flops, flops_per_token
from grok.model.params import num_parameters
from tests.fixtures.models import replace_keys


def test_every_product_of_a_small_model():
    model = ModelConfig(
        vocab_size=100,
        num_layers=3,
        embed_dim=16,
        moe=MoEConfig(dim=20, num_experts=5, num_selected=2),
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6),
    )
    q_and_o, k_and_v = 2 * 16 * 4 * 6, 2 * 16 * 2 * 6
    router, experts = 16 * 5, 2 * 3 * 16 * 20
    layer = 2 * (q_and_o + k_and_v + router + experts) + 2 * 2 * 4 * 6 * (64 / 2)
    assert flops_per_token(model, 64) == 3 * (3 * layer + 2 * 100 * 16)


@pytest.mark.parametrize("window", [1, 5, 64, 100])
def test_a_window_bounds_the_keys_that_a_query_sees(window):
    full = ModelConfig(
        vocab_size=100,
        num_layers=3,
        embed_dim=16,
        moe=MoEConfig(dim=20),
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6),
    )
    model = replace_keys(full, {"attention.window": window})
    # Of half a key of a query's own, and one for each before it.
    keys = [min(t + 0.5, window) for t in range(64)]
    missing = sum(t + 0.5 for t in range(64)) / 64 - sum(keys) / 64
    expected = flops_per_token(full, 64) - 3 * missing * 3 * 2 * 2 * 4 * 6
    assert flops_per_token(model, 64) == pytest.approx(expected, abs=3)
    assert decode_flops(full, 64) - decode_flops(model, 64) == (64 - min(64, window)) * 3 * 96


def test_a_new_token_sees_the_whole_cache():
    model = load_config("grok-1").model
    assert decode_flops(model, 4096) == flops_per_token(model, 8192) / 3


def test_the_release_at_its_full_length():
    model = load_config("grok-1").model
    # 6 x 83.76e9 parameters and 19.3e9 of causal attention.
    assert flops_per_token(model, 8192) == pytest.approx(522e9, rel=1e-3)


def test_a_table_that_is_only_looked_up_costs_no_flops():
    """With embeddings that are not tied, the head multiplies and the other table does not."""
    tied = load_config("grok-10m").model
    untied = dataclasses.replace(tied, tie_embeddings=False)
    assert num_parameters(untied) == num_parameters(tied) + tied.vocab_size * tied.embed_dim
    assert flops_per_token(untied, 128) == flops_per_token(tied, 128)
