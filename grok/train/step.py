"""The training step: a batch's gradients and the update. B rows, T tokens, n microbatches."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from grok import hardware, sharding
from grok.config import ModelConfig, RunConfig, TrainConfig
from grok.model.build import to_arrays
from grok.model.params import param_specs, tensor_specs
from grok.ops.weights.low_precision_grad import LowPrecisionGrad
from grok.optim import offload
from grok.optim.optimizer import make_schedule
from grok.optim.param_groups import combine, map_named, metric_group, names, partition, trainable
from grok.train import bad_steps, update_cpu
from grok.train.bad_steps import global_norm, select_if_ok, sums_of_squares
from grok.train.loss import batch_loss, count_tokens, expert_load
from grok.train.state import TrainState, as_float32


def train_step(
    state: TrainState, batch: dict, *, config: RunConfig, optimizer: optax.GradientTransformation
) -> tuple[TrainState, dict]:
    """One optimizer step. Returns the new state and the step's metrics, float32 unless said.

    Those of `batch_loss`, `loss` first, and: `learning_rate`; `grad_norm` before clipping,
    `update_norm` and `param_norm`, global norms of what is trained, the first two also of each
    group as `grad_norm/GROUP`; `skipped`, 1 when the step was bad and changed nothing;
    `bad_in_a_row`, up to this step; `bad_tensors`, bool in the order of `names(model)`: the tensors
    to blame."""
    params, frozen = partition(state.model, trainable(config))
    loss, metrics, grads = gradients(params, frozen, batch, config.train)
    state, update_metrics = update(state, params, loss, grads, config, optimizer)
    return state, metrics | update_metrics


def gradients(params, frozen, batch: dict, config: TrainConfig) -> tuple[jax.Array, dict, Any]:
    """Loss, metrics and gradient (float32) of a batch with respect to `params`; `frozen` is the
    rest of the model. With accumulation the batch passes through the model in microbatches, whose
    gradients, each weighted by its share of the tokens, add up to that of the batch. The balance
    loss needs the experts' loads of the whole batch first, from a forward pass of its own."""
    slots = grad_slots(params, frozen.config) if hardware.platform() == "tpu" else params

    def loss(slots, microbatch):
        model = with_grad_slots(combine(params, frozen), slots)
        return batch_loss(model, microbatch, config, totals, load_LE)

    def value_and_grad(microbatch):
        (total, metrics), grads = jax.value_and_grad(loss, has_aux=True)(slots, microbatch)
        return total, metrics, as_float32(grads)

    totals, load_LE = count_tokens(batch), None
    if config.grad_accum_steps == 1:
        return value_and_grad(batch)

    def sum_over(f):
        """The sum of `f` over microbatches."""

        def add(sums, microbatch):
            return jax.tree.map(jnp.add, sums, f(microbatch)), None

        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(f, first))
        return jax.lax.scan(add, zeros, batch_nBT)[0]

    batch_nBT = {name: microbatches(x_BT, config.grad_accum_steps) for name, x_BT in batch.items()}
    first = {name: x_nBT[0] for name, x_nBT in batch_nBT.items()}
    if config.router_balance_loss:
        load_LE = sum_over(lambda part: expert_load(combine(params, frozen), part, totals))
    return sum_over(value_and_grad)


def grad_slots(params, config: ModelConfig):
    """The tree that gradients are taken of, to keep them small: zeros in the type of computation,
    for each matrix of a layer that is stored in another type; `params` for the rest."""
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
    """The rows of a batch as `n` microbatches of every `n`-th row, on a leading axis. Neighbouring
    rows are on one device, so each device keeps its rows and has as many of every microbatch."""
    B, T = x_BT.shape
    spec = None if sharding.ambient_mesh() is None else sharding.spec("batch", None, "length")
    return jnp.moveaxis(jax.lax.reshape(x_BT, (B // n, n, T), out_sharding=spec), 1, 0)


def update(
    state: TrainState, params, loss: jax.Array, grads, config: RunConfig, optimizer
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Applies `grads` (float32) to `params`, the trained part of the model, unless the step is bad.
    Returns the new state and its metrics: those of `train_step` that are not of the loss."""
    old_params, old_opt_state = params, offload.to_device(state.opt_state)
    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(grads, old_opt_state, as_float32(params))
    with jax.named_scope("bad_step"):
        grad_squares, update_squares = (sums_of_squares(to_arrays(x)) for x in (grads, updates))
        bad, to_blame = bad_steps.detect_bad_step(state.guard, loss, grad_squares, config.train)
        guard = bad_steps.update_guard(state.guard, bad, global_norm(grad_squares))
    with jax.named_scope("apply_updates"):
        if hardware.platform() == "cpu":
            params, opt_state, update_squares = update_cpu.apply_in_place(
                bad, old_params, old_opt_state, grads, updates, update_squares, optimizer
            )
        else:
            params = select_if_ok(bad, optax.apply_updates(old_params, updates), old_params)
            opt_state = select_if_ok(bad, opt_state, old_opt_state)
        opt_state = offload.back(opt_state, state.opt_state)
    ema, decay = state.ema, config.optimizer.ema_decay
    if ema is not None:
        new_ema = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, ema, as_float32(params))
        ema = select_if_ok(bad, new_ema, ema)
    update_squares = {name: jnp.where(bad, 0, square) for name, square in update_squares.items()}
    schedule = make_schedule(config.optimizer, config.train.steps)
    metrics = {
        # A bad step leaves its place in the schedule to the next.
        "learning_rate": schedule(state.step - state.guard.skipped),
        "param_norm": global_norm(sums_of_squares(to_arrays(params))),
        **norms("grad_norm", grad_squares, config),
        **norms("update_norm", update_squares, config),
        "skipped": bad.astype(jnp.float32),
        "bad_in_a_row": guard.bad_in_a_row.astype(jnp.float32),
        "bad_tensors": jnp.stack([to_blame.get(name, False) for name in names(state.model)]),
    }
    return TrainState(state.step + 1, combine(params, state.model), opt_state, guard, ema), metrics


def norms(name: str, squares: dict[str, jax.Array], config: RunConfig) -> dict:
    """The norm of all tensors as NAME, and of each group of them as NAME/GROUP."""
    specs = tensor_specs(config.model, config.lora)
    groups: dict[str, dict[str, jax.Array]] = {}
    for tensor, square in squares.items():
        groups.setdefault(metric_group(config.optimizer, specs[tensor]), {})[tensor] = square
    group_norms = {f"{name}/{group}": global_norm(members) for group, members in groups.items()}
    return {name: global_norm(squares)} | group_norms
