"""Losses against their definitions, by chunks and at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grok
from grok.config import RunConfig, TrainConfig
from grok.model.moe import RouterStats
from grok.ops import cross_entropy
from grok.train import loss
from grok.train.loss import eval_step


@pytest.fixture(scope="module")
def model(tiny_run: RunConfig):
    return grok.init(tiny_run.model, jax.random.key(0))


def batch(rows: int, length: int, vocab_size: int) -> dict:
    random = np.random.default_rng(0)
    tokens = random.integers(1, vocab_size, (rows, length + 1), dtype=np.int32)
    mask = random.integers(0, 2, (rows, length)).astype(np.float32)
    return {"tokens_BT": tokens[:, :-1], "targets_BT": tokens[:, 1:], "mask_BT": mask}


def test_cross_entropy_and_z_loss_are_what_they_are_called(model):
    data = batch(2, 16, model.config.vocab_size)
    logits = np.asarray(model(data["tokens_BT"]), np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    target = np.take_along_axis(logits, data["targets_BT"][..., None], -1)[..., 0]
    mask = data["mask_BT"]
    entropy = ((log_z - target) * mask).sum() / mask.sum()
    z = (log_z**2 * mask).sum() / mask.sum()
    config = TrainConfig(z_loss=0.5)
    total, report = jax.jit(loss.batch_loss, static_argnums=2)(model, data, config)
    # Float32 sums of 32 terms of size 5: a few units in the last place.
    assert float(report["loss"]) == pytest.approx(entropy, rel=1e-6)
    assert float(total) == pytest.approx(entropy + 0.5 * z, rel=1e-6)


def test_chunks_of_tokens_change_nothing(model, monkeypatch):
    data = batch(2, 32, model.config.vocab_size)

    def losses():
        def both(model):
            x_BTD, _ = model.hidden(data["tokens_BT"])
            entropy, z = loss.token_losses(model, x_BTD, data["targets_BT"])
            return jnp.sum(entropy) + 0.1 * jnp.sum(z)

        return jax.jit(jax.value_and_grad(both))(model)

    whole, whole_grad = losses()
    monkeypatch.setattr(loss, "MAX_LOGITS", 0)
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", 8 * model.config.vocab_size)
    chunked, chunked_grad = losses()
    assert float(chunked) == pytest.approx(float(whole), rel=1e-6)
    for a, b in zip(jax.tree.leaves(whole_grad), jax.tree.leaves(chunked_grad), strict=True):
        # The table's gradient is summed chunk by chunk, in another order.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(a).max()))


def test_packed_documents_have_the_losses_they_have_alone(model):
    alone = batch(2, 16, model.config.vocab_size) | {"mask_BT": np.ones((2, 16), np.float32)}
    packed = {name: array.reshape(1, 32) for name, array in alone.items()}
    packed["segment_ids_BT"] = np.repeat([[1, 2]], 16, axis=1).astype(np.int32)
    packed["positions_BT"] = np.tile(np.arange(16, dtype=np.int32), (1, 2))
    losses = jax.jit(lambda model, data: loss.batch_loss(model, data, TrainConfig())[1]["loss"])
    sums = jax.jit(eval_step)
    assert float(losses(model, packed)) == pytest.approx(float(losses(model, alone)), rel=1e-6)
    assert float(sums(model, packed)) == pytest.approx(float(sums(model, alone)), rel=1e-6)
    del packed["segment_ids_BT"]
    assert float(losses(model, packed)) != pytest.approx(float(losses(model, alone)), rel=1e-4)


def test_a_batch_without_a_token_that_counts_has_no_loss(model):
    data = batch(2, 16, model.config.vocab_size) | {"mask_BT": np.zeros((2, 16), np.float32)}
    total, report = jax.jit(loss.batch_loss, static_argnums=2)(model, data, TrainConfig())
    assert (float(total), float(report["loss"])) == (0, 0)


def test_balance_loss_is_one_when_even_and_e_when_all_go_to_one():
    even = RouterStats(jnp.full(8, 1 / 8), jnp.full(8, 1 / 8), jnp.log(8))
    one = RouterStats(jnp.eye(8)[3], jnp.eye(8)[3], jnp.zeros(()))
    assert float(even.balance_loss()) == pytest.approx(1)
    assert float(one.balance_loss()) == pytest.approx(8)


def test_padding_is_no_part_of_router_statistics(tiny_run: RunConfig):
    config = dataclasses.replace(tiny_run.model, num_layers=1)
    model = grok.init(config, jax.random.key(1))
    tokens = np.random.default_rng(1).integers(1, config.vocab_size, (2, 16), dtype=np.int32)
    segments = np.ones_like(tokens)
    segments[:, 8:] = 0
    hidden = jax.jit(lambda model, tokens, segments: model.hidden(tokens, segments)[1])
    padded = hidden(model, tokens, segments)
    alone = hidden(model, tokens[:, :8], segments[:, :8])
    np.testing.assert_array_equal(padded.load_E, alone.load_E)
    np.testing.assert_allclose(padded.probability_E, alone.probability_E, rtol=1e-5)
    assert float(padded.load_E.sum()) == pytest.approx(1)
