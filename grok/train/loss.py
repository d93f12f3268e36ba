"""Losses of a batch and of a held-out text. Letters: B batch, T length, D embed, V vocab."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grok import sharding
from grok.config import TrainConfig
from grok.data.batch_schedule import Batch
from grok.data.device_feed import shard_batch
from grok.data.stream_batches import bits_per_byte
from grok.model.decoder import Decoder
from grok.model.moe import RouterStats
from grok.ops.cross_entropy import MAX_LOGITS, target_and_log_z


def token_losses(model: Decoder, x_BTD, targets_BT) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy in nats and squared log-partition of every token, (B, T) float32 each. If there
    are many logits, they never exist all at once, not in the backward pass either."""
    with sharding.use_mesh_of(model.final_norm.scale_D[...]):
        vocab = model.config.vocab_size // sharding.axis_size("vocab")
        if targets_BT.size // sharding.axis_size("batch") * vocab > MAX_LOGITS:
            factors = model.config.logit_multiplier, model.config.logit_softcap
            entropy_BT, log_z_BT = model.head.cross_entropy(x_BTD, targets_BT, *factors)
            return entropy_BT, jnp.square(log_z_BT)
    target_BT, log_z_BT = target_and_log_z(model.unembed(x_BTD), targets_BT)
    return log_z_BT - target_BT, jnp.square(log_z_BT)


def hidden(model: Decoder, batch: dict) -> tuple[jax.Array, RouterStats | None]:
    """`Decoder.hidden` of a batch, whose rows are packed or one segment each."""
    return model.hidden(batch["tokens_BT"], batch.get("segment_ids_BT"), batch.get("positions_BT"))


class TokenCounts(NamedTuple):
    """Numbers of tokens of a batch, float32: those that the loss counts, and all but padding."""

    counted: jax.Array
    real: jax.Array


def count_tokens(batch: dict) -> TokenCounts:
    """The tokens of a batch, at least one of each kind, since sums are divided by them."""
    real_BT = batch["segment_ids_BT"] > 0 if "segment_ids_BT" in batch else batch["tokens_BT"] >= 0
    counted, real = jnp.sum(batch["mask_BT"]), jnp.sum(real_BT, dtype=jnp.float32)
    return TokenCounts(jnp.maximum(counted, 1), jnp.maximum(real, 1))


def batch_loss(
    model: Decoder,
    batch: dict,
    config: TrainConfig,
    totals: TokenCounts | None = None,
    load_LE: jax.Array | None = None,
) -> tuple[jax.Array, dict]:
    """The loss that a training step minimises, per token, and the metrics of it (float32).

    `batch` holds tokens_BT, targets_BT and mask_BT (1 where a token counts), and where rows are
    packed segment_ids_BT and positions_BT. A batch in which no token counts has no loss. For a
    microbatch, `totals` counts the tokens of its batch: losses and metrics of microbatches then add
    up to those of the batch. The balance loss, a product of two means, does so with `load_LE`, the
    sum of `expert_load` over microbatches; without it becomes the mean over microbatches.

    Metrics: `loss`, the cross-entropy in nats a token; `z_loss`, the mean squared log-partition,
    where it is minimised; and of a model with experts `router_balance`, 1 when they are used
    evenly; `router_entropy`, nats; `expert_load`, share of each expert, mean over layers;
    `expert_load_layers`, of each layer."""
    totals = totals or count_tokens(batch)
    x_BTD, stats = hidden(model, batch)
    with jax.named_scope("cross_entropy"):
        entropy_BT, z_BT = token_losses(model, x_BTD, batch["targets_BT"])
        entropy = jnp.sum(entropy_BT * batch["mask_BT"]) / totals.counted
        z = jnp.sum(z_BT * batch["mask_BT"]) / totals.counted
    metrics = {"loss": entropy}
    total = entropy + config.z_loss * z
    if stats is not None:
        metrics |= _router_metrics(stats, count_tokens(batch).real / totals.real, load_LE)
        total += config.router_balance_loss * metrics["router_balance"]
    if config.z_loss:
        metrics["z_loss"] = z
    return total, metrics


def expert_load(model: Decoder, microbatch: dict, totals: TokenCounts) -> jax.Array:
    """Part of a microbatch in the share of its batch's assignments that go to each expert of each
    layer, load_LE, float32; `totals` counts the tokens of the batch."""
    _, stats = hidden(model, microbatch)
    assert stats is not None
    return count_tokens(microbatch).real / totals.real * stats.load_E


def _router_metrics(
    stats: RouterStats, share: jax.Array, load_LE: jax.Array | None
) -> dict[str, jax.Array]:
    """Metrics of the routers of a microbatch that has this share of its batch's tokens, which went
    to the experts in shares `load_LE`."""
    balanced = stats if load_LE is None else dataclasses.replace(stats, load_E=load_LE)
    return {
        "router_balance": share * jnp.mean(balanced.balance_loss()),
        "router_entropy": share * jnp.mean(stats.entropy),
        "expert_load": share * jnp.mean(stats.load_E, axis=0),
        "expert_load_layers": share * stats.load_E,
    }


def eval_step(model, batch: dict) -> jax.Array:
    """Sum of the cross-entropy of all tokens that count, nats (float32)."""
    x_BTD, _ = hidden(model, batch)
    entropy_BT, _ = token_losses(model, x_BTD, batch["targets_BT"])
    return jnp.sum(entropy_BT * batch["mask_BT"])


def total_loss(step: Callable, model, batches: Iterable[Batch], mesh: Mesh) -> tuple[float, int]:
    """Sum of the cross-entropy of all tokens that count, in nats, and the number of them."""
    nats, num_tokens = 0.0, 0
    for batch in batches:
        nats += float(step(model, shard_batch(batch, mesh)))
        num_tokens += int(batch["mask_BT"].sum(dtype="float64"))
    return nats, num_tokens


def validate(
    step: Callable, model, batches: Iterable[Batch], num_bytes: int | None, mesh: Mesh
) -> dict[str, float]:
    """Loss of a pass in nats a token, and in bits per byte where `num_bytes` is known."""
    nats, num_tokens = total_loss(step, model, batches, mesh)
    losses = {"validation_loss": nats / num_tokens}
    if num_bytes is not None:
        losses["validation_bits_per_byte"] = bits_per_byte(nats, num_bytes)
    return losses
