"""Bad steps: recognised, skipped and counted inside the compiled step.

A step is bad when its loss or a gradient is not finite, or, with `train.grad_spike_factor`, when
the gradient's norm is that many times its running average. A bad step changes no parameter, moment
or average, but counts as a step, since its batch was used.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from grok.config import TrainConfig

# Decay of the running average of the gradient's norm.
SMOOTHING = 0.98


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
    """Returns whether the step is bad, and for each tensor whether it is to blame.

    `squares` has the sum of squares of each tensor's gradient. To blame are those that are not
    finite; when the gradient is finite and too large, the largest.
    """
    largest, norm = jnp.max(jnp.stack(list(squares.values()))), global_norm(squares)
    limit = config.grad_spike_factor * guard.smoothed_norm
    spike = (limit > 0) & (norm > limit)
    to_blame = {
        name: ~jnp.isfinite(square) | (spike & (square == largest))
        for name, square in squares.items()
    }
    return ~(jnp.isfinite(loss) & jnp.isfinite(norm)) | spike, to_blame


def update_guard(guard: Guard, bad: jax.Array, norm: jax.Array) -> Guard:
    """Returns the guard after a step whose gradient has this norm."""
    smoothed = SMOOTHING * guard.smoothed_norm + (1 - SMOOTHING) * norm
    smoothed = jnp.where(guard.smoothed_norm > 0, smoothed, norm)
    return Guard(
        jnp.where(bad, guard.bad_in_a_row + 1, 0),
        guard.skipped + bad,
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
