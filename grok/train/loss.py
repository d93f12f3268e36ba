"""Losses of a batch: cross-entropy, z-loss, and the router's balance loss.

Letters: B batch, T length, D embed, V vocab, c tokens of a chunk.
"""

import jax
import jax.numpy as jnp

from grok.config import TrainConfig
from grok.model.grok import Grok
from grok.model.moe import RouterStats

CHUNK = 512


def token_losses(model: Grok, x_BTD, targets_BT) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy in nats and squared log-partition of every token, (B, T) float32 each.

    Works through chunks of tokens and computes each again in backward, so that logits of
    (B, T, V) never exist at once.
    """

    def one_chunk(x_BcD, targets_Bc):
        logits_BcV = model.unembed(x_BcD)
        log_z = jax.nn.logsumexp(logits_BcV, axis=-1)
        # A sum under a mask, not an index: the vocabulary is split over devices.
        is_target = jnp.arange(logits_BcV.shape[-1])[None, None, :] == targets_Bc[:, :, None]
        target = jnp.sum(jnp.where(is_target, logits_BcV, 0), axis=-1)
        return log_z - target, jnp.square(log_z)

    B, T = targets_BT.shape
    if T <= CHUNK or T % CHUNK:
        return one_chunk(x_BTD, targets_BT)

    def split(x):
        return jnp.moveaxis(x.reshape(B, T // CHUNK, CHUNK, *x.shape[2:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(B, T)

    losses = jax.lax.map(
        lambda chunk: jax.checkpoint(one_chunk)(*chunk), (split(x_BTD), split(targets_BT))
    )
    return join(losses[0]), join(losses[1])


def hidden(model: Grok, batch: dict) -> tuple[jax.Array, RouterStats]:
    """What `Grok.hidden` makes of a batch, whose rows are packed or one segment each."""
    return model.hidden(batch["tokens_BT"], batch.get("segment_ids_BT"), batch.get("positions_BT"))


def batch_loss(model: Grok, batch: dict, config: TrainConfig) -> tuple[jax.Array, dict]:
    """What a training step minimises, per token, and what it reports (float32 scalars).

    `batch` holds tokens_BT, targets_BT and mask_BT (1 where a token counts), and where rows are
    packed segment_ids_BT and positions_BT. A batch in which no token counts has no loss. Reported:
    `loss`, the cross-entropy in nats a token; `expert_load`, share of each expert, mean over
    layers; `router_balance`, 1 when experts are used evenly.
    """
    x_BTD, stats = hidden(model, batch)
    entropy_BT, z_BT = token_losses(model, x_BTD, batch["targets_BT"])
    mask_BT = batch["mask_BT"]
    count = jnp.maximum(jnp.sum(mask_BT), 1)
    entropy = jnp.sum(entropy_BT * mask_BT) / count
    z = jnp.sum(z_BT * mask_BT) / count
    balance = jnp.mean(stats.balance_loss())
    total = entropy + config.z_loss * z + config.router_balance_loss * balance
    report = {
        "loss": entropy,
        "router_balance": balance,
        "expert_load": jnp.mean(stats.load_E, axis=0),
    }
    return total, report
