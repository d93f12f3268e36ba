"""The optimizer's part of a step: from gradients to new parameters, moments and average."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from grok import hardware
from grok.config import RunConfig
from grok.model.build import to_arrays
from grok.model.params import tensor_specs
from grok.optim import offload
from grok.optim.param_groups import combine, metric_group, names
from grok.optim.schedule import make_schedule
from grok.train import update_cpu
from grok.train.bad_steps import (
    detect_bad_step,
    global_norm,
    select_if_ok,
    sums_of_squares,
    update_guard,
)
from grok.train.state import TrainState, as_float32


def update(
    state: TrainState,
    params: Any,
    loss: jax.Array,
    grads: Any,
    *,
    config: RunConfig,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Applies `grads` (float32) to `params`, the trained part of the model, unless the step is bad.

    Returns the new state and its metrics: those of `train_step` that are not of the loss.
    """
    old_params, old_opt_state = params, offload.to_device(state.opt_state)
    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(grads, old_opt_state, as_float32(params))
    with jax.named_scope("bad_step"):
        grad_squares, update_squares = (sums_of_squares(to_arrays(x)) for x in (grads, updates))
        bad, to_blame = detect_bad_step(state.guard, loss, grad_squares, config.train)
        guard = update_guard(state.guard, bad, global_norm(grad_squares))
    with jax.named_scope("apply_updates"):
        if hardware.platform() == "cpu":
            params, opt_state, update_squares = update_cpu.apply_in_place(
                bad, old_params, old_opt_state, grads, updates, update_squares, optimizer
            )
        else:
            params = select_if_ok(bad, optax.apply_updates(old_params, updates), old_params)
            opt_state = select_if_ok(bad, opt_state, old_opt_state)
        opt_state = offload.back(opt_state, state.opt_state)
    ema = state.ema
    if ema is not None:
        ema = select_if_ok(bad, ema_update(ema, params, config.optimizer.ema_decay), ema)
    update_squares = {name: jnp.where(bad, 0, square) for name, square in update_squares.items()}
    metrics = {
        # A bad step leaves its place in the schedule to the next.
        "learning_rate": make_schedule(config.optimizer, config.train.steps)(
            state.step - state.guard.skipped
        ),
        "param_norm": global_norm(sums_of_squares(to_arrays(params))),
        **norms("grad_norm", grad_squares, config),
        **norms("update_norm", update_squares, config),
        "skipped": bad.astype(jnp.float32),
        "bad_in_a_row": guard.bad_in_a_row.astype(jnp.float32),
        "bad_tensors": jnp.stack([to_blame.get(name, False) for name in names(state.model)]),
    }
    model = combine(params, state.model)
    return TrainState(state.step + 1, model, opt_state, guard, ema), metrics


def ema_update(ema, params, decay: float):
    """The moving average after a step that led to `params`."""
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, as_float32(params))


def norms(name: str, squares: dict[str, jax.Array], config: RunConfig) -> dict:
    """The norm of all tensors as NAME, and of each group of them as NAME/GROUP."""
    specs = tensor_specs(config.model, config.lora)
    groups: dict[str, dict[str, jax.Array]] = {}
    for tensor, square in squares.items():
        groups.setdefault(metric_group(config.optimizer, specs[tensor]), {})[tensor] = square
    group_norms = {f"{name}/{group}": global_norm(members) for group, members in groups.items()}
    return {name: global_norm(squares)} | group_norms
