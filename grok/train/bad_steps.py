"""Bad steps: skipped and counted inside the compiled step, and the rollback after many in a row.
Bad is a loss or gradient that is not finite, or, with `train.grad_spike_factor`, a norm so many
times its running average. Such a step changes no parameter, moment or average, but is counted."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from grok.config import TrainConfig
from grok.errors import Diverged

SMOOTHING = 0.98  # decay of the running average of the gradient's norm
MAX_NAMES = 5  # tensors that a message lists
Skipped = tuple[tuple[int, int], ...]  # first and last number of each range of skipped batches


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Guard:
    """Statistics of the steps so far."""

    bad_in_a_row: jax.Array  # int32: bad steps since the last good one
    skipped: jax.Array  # int32: bad steps of the whole run
    smoothed_norm: jax.Array  # float32: running average of good norms; 0 before the first


def init_guard() -> Guard:
    """Returns the guard before the first step."""
    return Guard(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))


def detect_bad_step(
    guard: Guard, loss: jax.Array, squares: dict[str, jax.Array], config: TrainConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns whether the step is bad, and for each tensor whether it is to blame. `squares` has
    the sum of squares of each tensor's gradient. To blame are those that are not finite; when the
    gradient is finite and too large, the largest."""
    largest, norm = jnp.max(jnp.stack(list(squares.values()))), global_norm(squares)
    limit = config.grad_spike_factor * guard.smoothed_norm
    spike = (limit > 0) & (norm > limit)
    to_blame = {name: ~jnp.isfinite(x) | (spike & (x == largest)) for name, x in squares.items()}
    return ~(jnp.isfinite(loss) & jnp.isfinite(norm)) | spike, to_blame


def update_guard(guard: Guard, bad: jax.Array, norm: jax.Array) -> Guard:
    """Returns the guard after a step whose gradient has this norm."""
    smoothed = SMOOTHING * guard.smoothed_norm + (1 - SMOOTHING) * norm
    smoothed = jnp.where(guard.smoothed_norm > 0, smoothed, norm)
    return Guard(
        jnp.where(bad, guard.bad_in_a_row + 1, 0),
        guard.skipped + bad.astype(jnp.int32),
        jnp.where(bad, guard.smoothed_norm, smoothed),
    )


def select_if_ok(bad: jax.Array, new: Any, old: Any) -> Any:
    """Returns the tree `new`, or after a bad step `old`, bit for bit."""
    return jax.tree.map(lambda new, old: jnp.where(bad, old, new), new, old)


def sums_of_squares(tensors: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Sum of squares of each tensor, float32 scalars."""
    return {name: jnp.sum(jnp.square(x.astype(jnp.float32))) for name, x in tensors.items()}


def global_norm(squares: dict[str, jax.Array]) -> jax.Array:
    """The norm of several tensors together, from the sums of their squares."""
    return jnp.sqrt(sum(squares.values(), jnp.zeros(())))


def raise_if_diverged(step: int, metrics: Mapping, names: Sequence[str], limit: int) -> None:
    """Waits for the metrics of `step`; raises Diverged when the last `limit` steps were bad."""
    num_bad = int(metrics["bad_in_a_row"])
    if num_bad < limit:
        return
    to_blame = jax.device_get(metrics["bad_tensors"])
    blamed = [name for name, is_bad in zip(names, to_blame, strict=True) if is_bad]
    more = f" and {len(blamed) - MAX_NAMES} more" if len(blamed) > MAX_NAMES else ""
    cause = f"the gradients of {', '.join(blamed[:MAX_NAMES])}{more}" if blamed else "the loss"
    raise Diverged(
        f"the {num_bad} steps up to step {step} were bad (train.max_bad_steps={limit}), in "
        f"{cause}, and changed nothing; an older checkpoint with a lower optimizer.peak_lr, or "
        "train.rollback_on_divergence=true, may get past them.",
        first=step - num_bad + 1,
        last=step,
    )


def batch_number(step: int, skipped: Skipped) -> int:
    """Number of the batch that follows after `step` steps."""
    return step + sum(last - first + 1 for first, last in skipped)


def rollback_step(steps: Sequence[int], error: Diverged, began: int, rolled_back: bool) -> int:
    """Returns the newest of the checkpoints of `steps` from before the bad steps. If the run was
    `rolled_back` to step `began` and then diverged without a new checkpoint, that one was not good
    enough, and the one before it is taken. Raises `error` when none is left."""
    good = [step for step in steps if step < error.first]
    if rolled_back:
        good = [step for step in good if step > began] or [step for step in good if step < began]
    if not good:
        raise error
    return max(good)


def skip_batches(before: Skipped, step: int, error: Diverged, skipped: Skipped) -> Skipped:
    """The batches to skip after a rollback from `error` to the checkpoint of `step`, up to which
    `before` had been skipped; `skipped`: those up to the bad steps."""
    first = batch_number(step, before)
    return (*before, (first, batch_number(error.last - 1, skipped)))
