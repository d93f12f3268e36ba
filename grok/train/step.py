"""The training and evaluation steps, as pure functions.

B rows of a batch, T tokens of a row, n microbatches.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from grok import hardware, sharding
from grok.config import ModelConfig, RunConfig, TrainConfig
from grok.model.params import param_specs
from grok.ops.weights.low_precision_grad import LowPrecisionGrad
from grok.optim.param_groups import combine, map_named, partition, trainable
from grok.train.loss import batch_loss, count_tokens, hidden, token_losses
from grok.train.state import TrainState, as_float32
from grok.train.update import update


def train_step(
    state: TrainState, batch: dict, *, config: RunConfig, optimizer: optax.GradientTransformation
) -> tuple[TrainState, dict]:
    """One optimizer step. Returns the new state and the step's metrics, float32 unless said.

    Those of `batch_loss`, and: `learning_rate`; `grad_norm` before clipping, `update_norm` and
    `param_norm`, global norms of what is trained, the first two also of each group as
    `grad_norm/GROUP`; `skipped`, 1 when the step was bad and changed nothing; `bad_in_a_row`, up
    to this step; `bad_tensors`, bool in the order of `names(model)`: the tensors to blame.
    """
    params, frozen = partition(state.model, trainable(config))
    loss, metrics, grads = gradients(params, frozen, batch, config.train)
    state, update_metrics = update(state, params, loss, grads, config=config, optimizer=optimizer)
    return state, metrics | update_metrics


def gradients(params, frozen, batch: dict, config: TrainConfig) -> tuple[jax.Array, dict, Any]:
    """Loss, metrics and gradient (float32) of a batch with respect to `params`; `frozen` is the
    rest of the model.

    With accumulation the batch passes through the model in microbatches, whose gradients, each
    weighted by its share of the tokens, add up to that of the batch.
    """
    slots = grad_slots(params, frozen.config) if hardware.platform() == "tpu" else params

    def loss(slots, microbatch):
        model = with_grad_slots(combine(params, frozen), slots)
        return batch_loss(model, microbatch, config, totals)

    def value_and_grad(microbatch):
        (total, metrics), grads = jax.value_and_grad(loss, has_aux=True)(slots, microbatch)
        return total, metrics, as_float32(grads)

    totals = count_tokens(batch)
    if config.grad_accum_steps == 1:
        return value_and_grad(batch)

    def add(sums, microbatch):
        return jax.tree.map(jnp.add, sums, value_and_grad(microbatch)), None

    batch_nBT = {name: microbatches(x_BT, config.grad_accum_steps) for name, x_BT in batch.items()}
    first = {name: x_nBT[0] for name, x_nBT in batch_nBT.items()}
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(value_and_grad, first))
    return jax.lax.scan(add, zeros, batch_nBT)[0]


def grad_slots(params, config: ModelConfig):
    """The tree that gradients are taken of, to keep them small: zeros in the type of
    computation, for each matrix of a layer that is stored in another type; `params` for the rest.
    """
    specs, dtype = param_specs(config), config.compute_dtype

    def grad_slot(name: str, w):
        cast = name in specs and specs[name].is_matmul and w.dtype != jnp.dtype(dtype)
        return jnp.zeros_like(w, dtype) if cast else w

    return map_named(grad_slot, params)


def with_grad_slots(model, slots):
    """The model with each tensor taken from `slots`, or with its gradient slot beside it."""

    def one(slot, w):
        if slot is None:
            return w
        return slot if slot.dtype == w.dtype else LowPrecisionGrad(w, slot)

    return jax.tree.map(one, slots, model, is_leaf=lambda x: x is None)


def microbatches(x_BT: jax.Array, n: int) -> jax.Array:
    """The rows of a batch as `n` microbatches of every `n`-th row, on a leading axis.

    Neighbouring rows are on one device, so each device keeps its rows and has as many of every
    microbatch.
    """
    B, T = x_BT.shape
    out_sharding = (
        None if sharding.ambient_mesh() is None else sharding.spec("batch", None, "length")
    )
    return jnp.moveaxis(jax.lax.reshape(x_BT, (B // n, n, T), out_sharding=out_sharding), 1, 0)


def eval_step(model, batch: dict) -> jax.Array:
    """Sum of the cross-entropy of all tokens that count, nats (float32)."""
    x_BTD, _ = hidden(model, batch)
    entropy_BT, _ = token_losses(model, x_BTD, batch["targets_BT"])
    return jnp.sum(entropy_BT * batch["mask_BT"])
