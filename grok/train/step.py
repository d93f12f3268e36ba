"""The steps, as pure functions: what goes in decides what comes out."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from grok import sharding
from grok.config import OptimizerConfig, RunConfig, TrainConfig
from grok.model.build import to_arrays
from grok.model.params import MATRICES
from grok.ops.weights.low_precision_grad import CastArray
from grok.optim import offload
from grok.optim.param_groups import combine, map_named, metric_group, names, partition, trainable
from grok.optim.schedule import make_schedule
from grok.train.bad_steps import (
    detect_bad_step,
    global_norm,
    select_if_ok,
    sums_of_squares,
    update_guard,
)
from grok.train.loss import batch_loss, count_tokens, hidden, token_losses
from grok.train.state import TrainState, as_float32


def train_step(
    state: TrainState,
    batch: dict,
    *,
    config: RunConfig,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict]:
    """One optimizer step. Returns the new state and the step's metrics, float32 unless said.

    Those of `batch_loss`, and: `learning_rate`; `grad_norm` before clipping, `update_norm` and
    `param_norm`, global norms of what is trained, the first two also of each group as
    `grad_norm/GROUP`; `skipped`, 1 when the step was bad and changed nothing; `bad_in_a_row`, up
    to this step; `bad_tensors`, bool in the order of `names(model)`: the tensors to blame.
    """
    params = partition(state.model, trainable(config))
    loss, metrics, grads = gradients(params, state.model, batch, config.train)
    old_opt_state = offload.to_device(state.opt_state)
    updates, opt_state = optimizer.update(grads, old_opt_state, as_float32(params))

    grad_squares, update_squares = (sums_of_squares(to_arrays(x)) for x in (grads, updates))
    bad, to_blame = detect_bad_step(state.guard, loss, grad_squares, config.train)
    guard = update_guard(state.guard, bad, global_norm(grad_squares))
    # XLA on CPU would copy parameters and moments, to write over what it has yet to read, and hold
    # all updates at once. So it reads all that a tensor's update needs, then the tensor changes,
    # and then its moments.
    old_params = params
    if sharding.platform() == "cpu":
        squares = list(update_squares.values())
        old_params, updates, squares = barrier_per_leaf(params, updates, squares)
        update_squares = dict(zip(update_squares, squares, strict=True))
    params = select_if_ok(bad, optax.apply_updates(old_params, updates), old_params)
    if sharding.platform() == "cpu":
        params, grads = barrier_per_leaf(params, grads)
        _, opt_state = optimizer.update(grads, old_opt_state, as_float32(old_params))
    opt_state = offload.back(select_if_ok(bad, opt_state, old_opt_state), state.opt_state)
    ema = state.ema
    if ema is not None:
        ema = select_if_ok(bad, ema_update(ema, params, config.optimizer.ema_decay), ema)

    update_squares = {name: jnp.where(bad, 0, square) for name, square in update_squares.items()}
    metrics |= {
        # A bad step leaves its place in the schedule to the next.
        "learning_rate": make_schedule(config.optimizer, config.train.steps)(
            state.step - state.guard.skipped
        ),
        "param_norm": global_norm(sums_of_squares(to_arrays(params))),
        **norms("grad_norm", grad_squares, config.optimizer),
        **norms("update_norm", update_squares, config.optimizer),
        "skipped": bad.astype(jnp.float32),
        "bad_in_a_row": guard.bad_in_a_row.astype(jnp.float32),
        "bad_tensors": jnp.stack([to_blame.get(name, False) for name in names(state.model)]),
    }
    return TrainState(state.step + 1, combine(params, state.model), opt_state, guard, ema), metrics


def barrier_per_leaf(*trees):
    """The trees, as lists or of one structure, of which what comes at a leaf waits for the leaves
    of all at that place."""
    leaves = zip(*map(jax.tree.leaves, trees), strict=True)
    waited = zip(*map(jax.lax.optimization_barrier, leaves), strict=True)
    return [
        jax.tree.unflatten(jax.tree.structure(tree), each)
        for tree, each in zip(trees, waited, strict=True)
    ]


def gradients(params, model, batch: dict, config: TrainConfig) -> tuple[jax.Array, dict, Any]:
    """Loss, report and gradient (float32) of a batch with respect to `params`, a part of `model`.

    With accumulation the batch goes through the model in parts, and their gradients, each weighted
    by its share of the tokens, add up to that of the batch.
    """
    wanted = (
        grad_slots(params, model.config.compute_dtype) if sharding.platform() == "tpu" else params
    )

    def loss(wanted, part, whole):
        return batch_loss(with_grad_slots(combine(params, model), wanted), part, config, whole)

    def of_part(part):
        (total, report), grads = jax.value_and_grad(loss, has_aux=True)(wanted, part, whole)
        return total, report, as_float32(grads)

    whole = count_tokens(batch)
    if config.grad_accum_steps == 1:
        return of_part(batch)

    def add(sums, part):
        return jax.tree.map(jnp.add, sums, of_part(part)), None

    parts = {
        name: microbatches(array_BT, config.grad_accum_steps) for name, array_BT in batch.items()
    }
    first = {name: array_nBT[0] for name, array_nBT in parts.items()}
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_part, first))
    return jax.lax.scan(add, zeros, parts)[0]


def grad_slots(params, dtype):
    """What a gradient is taken of to stay small: seats for matrices of layers that are of another
    type than that of computation, which their gradients are made in, and `params` for the rest."""

    def seat(name: str, w):
        cast = name in MATRICES and name.startswith("layers/") and w.dtype != jnp.dtype(dtype)
        return jnp.zeros_like(w, dtype) if cast else w

    return map_named(seat, params)


def with_grad_slots(model, wanted):
    """The model with each tensor out of `wanted`, or with its seat beside it."""

    def one(mine, w):
        if mine is None:
            return w
        return mine if mine.dtype == w.dtype else CastArray(w, mine)

    return jax.tree.map(one, wanted, model, is_leaf=lambda x: x is None)


def microbatches(array_BT: jax.Array, number: int) -> jax.Array:
    """The rows of a batch as `number` microbatches of every `number`-th row, on a leading axis.

    Neighbouring rows are on one device, so each keeps its own and has as many of every microbatch.
    """
    B, T = array_BT.shape
    parts = None if sharding.ambient_mesh() is None else sharding.spec("batch", None, "length")
    rows = jax.lax.reshape(array_BT, (B // number, number, T), out_sharding=parts)
    return jnp.moveaxis(rows, 1, 0)


def norms(name: str, squares: dict[str, jax.Array], config: OptimizerConfig) -> dict:
    """The norm of all tensors as NAME, and of each group of them as NAME/GROUP."""
    groups: dict[str, dict[str, jax.Array]] = {}
    for tensor, square in squares.items():
        groups.setdefault(metric_group(config, tensor), {})[tensor] = square
    of_groups = {f"{name}/{group}": global_norm(part) for group, part in groups.items()}
    return {name: global_norm(squares)} | of_groups


def ema_update(ema, params, decay: float):
    """The moving average after a step that led to `params`."""
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, as_float32(params))


def eval_step(model, batch: dict) -> jax.Array:
    """Sum of the cross-entropy of all tokens that count, nats (float32)."""
    x_BTD, _ = hidden(model, batch)
    entropy_BT, _ = token_losses(model, x_BTD, batch["targets_BT"])
    return jnp.sum(entropy_BT * batch["mask_BT"])
