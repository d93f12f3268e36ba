"""Steps that would do harm: recognised and counted inside the compiled step.

A step is bad when its loss or a gradient is not finite, or, where the config asks for it, when the
gradient's norm is far above what it usually is. A bad step changes no parameter, moment or average;
its number is used up all the same, since its batch was.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from grok.config import TrainConfig

# Share of the usual norm that a good step does not replace by its own.
SMOOTHING = 0.98


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Guard:
    """What is known of the steps so far."""

    bad_in_a_row: jax.Array  # int32: bad steps since the last good one
    skipped: jax.Array  # int32: bad steps of the whole run
    smoothed_norm: jax.Array  # float32: usual norm of the gradient; 0 before the first good step


def init_guard() -> Guard:
    """Before the first step."""
    return Guard(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))


def detect_bad_step(
    guard: Guard, loss: jax.Array, squares: dict[str, jax.Array], config: TrainConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Whether the step is bad, and the tensors to blame.

    `squares` has the sum of squares of each tensor's gradient. To blame are those that are not
    finite; of a gradient that is finite and too large, the largest.
    """
    largest, norm = jnp.max(jnp.stack(list(squares.values()))), global_norm(squares)
    limit = config.grad_spike_factor * guard.smoothed_norm
    spike = (limit > 0) & (norm > limit)
    tensors = {
        name: ~jnp.isfinite(square) | (spike & (square == largest))
        for name, square in squares.items()
    }
    return ~(jnp.isfinite(loss) & jnp.isfinite(norm)) | spike, tensors


def update_guard(guard: Guard, bad: jax.Array, norm: jax.Array) -> Guard:
    """The guard after a step whose gradient has this norm."""
    smoothed = SMOOTHING * guard.smoothed_norm + (1 - SMOOTHING) * norm
    smoothed = jnp.where(guard.smoothed_norm > 0, smoothed, norm)
    return Guard(
        jnp.where(bad, guard.bad_in_a_row + 1, 0),
        guard.skipped + bad,
        jnp.where(bad, guard.smoothed_norm, smoothed),
    )


def select_if_ok(bad: jax.Array, new: Any, old: Any) -> Any:
    """The new tree, or the old one, bit for bit, after a bad step."""
    return jax.tree.map(lambda new, old: jnp.where(bad, old, new), new, old)


def sums_of_squares(tensors: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Of each tensor by name, float32 scalars."""
    return {name: jnp.sum(jnp.square(x.astype(jnp.float32))) for name, x in tensors.items()}


def global_norm(squares: dict[str, jax.Array]) -> jax.Array:
    """The norm of tensors together, from the sums of their squares."""
    return jnp.sqrt(sum(squares.values(), jnp.zeros(())))
