"""The steps, as pure functions: what goes in decides what comes out."""

import jax
import jax.numpy as jnp
import optax

from grok.config import TrainConfig
from grok.train.loss import batch_loss, hidden, token_losses
from grok.train.state import TrainState, as_float32


def train_step(
    state: TrainState,
    batch: dict,
    *,
    config: TrainConfig,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict]:
    """One optimizer step. Returns the new state and the step's metrics (see `batch_loss`), with
    the gradient's global norm before clipping as `grad_norm`."""
    loss_and_grad = jax.value_and_grad(batch_loss, has_aux=True)
    (_, metrics), grads = loss_and_grad(state.model, batch, config)
    grads = as_float32(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, as_float32(state.model))
    model = optax.apply_updates(state.model, updates)
    metrics["grad_norm"] = optax.tree.norm(grads)
    return TrainState(state.step + 1, model, opt_state), metrics


def eval_step(model, batch: dict) -> jax.Array:
    """Sum of the cross-entropy of all tokens that count, nats (float32)."""
    x_BTD, _ = hidden(model, batch)
    entropy_BT, _ = token_losses(model, x_BTD, batch["targets_BT"])
    return jnp.sum(entropy_BT * batch["mask_BT"])
