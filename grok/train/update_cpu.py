"""The form that an update of the parameters takes on CPU, where XLA would copy them."""

from typing import Any

import jax
import optax

from grok.train.bad_steps import select_if_ok
from grok.train.state import as_float32


def apply_in_place(
    bad: jax.Array, params, opt_state, grads, updates, update_squares: dict, optimizer
) -> tuple[Any, optax.OptState, dict[str, jax.Array]]:
    """Returns `params` after `updates` and `opt_state` after `grads`, both unchanged after a bad
    step, and `update_squares`, the updates' sums of squares, computed before any tensor changes.

    XLA on CPU would otherwise copy them and hold all updates at once. With these barriers it reads
    all that an update needs, then changes a tensor in place, then its moments, computed again."""
    params, updates, squares = barrier_per_leaf(params, updates, list(update_squares.values()))
    update_squares = dict(zip(update_squares, squares, strict=True))
    new_params = select_if_ok(bad, optax.apply_updates(params, updates), params)
    new_params, grads = barrier_per_leaf(new_params, grads)
    _, new_opt_state = optimizer.update(grads, opt_state, as_float32(params))
    return new_params, select_if_ok(bad, new_opt_state, opt_state), update_squares


def barrier_per_leaf(*trees):
    """The trees, each leaf available only once those at its position in all are computed."""
    leaves = zip(*map(jax.tree.leaves, trees), strict=True)
    barred_leaves = zip(*map(jax.lax.optimization_barrier, leaves), strict=True)
    return [
        jax.tree.unflatten(jax.tree.structure(tree), barred)
        for tree, barred in zip(trees, barred_leaves, strict=True)
    ]
