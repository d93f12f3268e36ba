"""Adafactor: second moments of matrices, stored as one number per row and one per column. Shazeer &
Stern 2018, in the form of Zhai et al. 2022 (Scaling Vision Transformers, appendix): the decay of
the second moment has a ceiling, and neither learning rate nor update depends on the parameter's own
size, so that learning rates are those of AdamW."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from grok.model.param_spec import ParamSpec
from grok.optim.param_groups import Specs, map_named

# Added to squared gradients, so that the second moment of a row of zeros is not 0.
EPSILON = 1e-30
# Uses of large matrices, token table among them; a router's moments are kept whole.
FACTORED_USES = ("matmul", "embed")
# Decay 1 - t^-POWER: at first an even mean over all steps, later an exponential one.
POWER = 0.8


class FactoredState(NamedTuple):
    """Second moments, as trees like the parameters. rows: the mean over a matrix's columns, or the
    full second moment of another tensor. columns: the mean over its rows, or None."""

    updates: jax.Array  # int32: updates so far
    rows: Any
    columns: Any


def scale_by_factored_second_moment(ceiling: float, specs: Specs) -> optax.GradientTransformation:
    """Divides gradients by the root of their second moment, of decay min(1 - t^-0.8, ceiling)."""

    def init(params) -> FactoredState:
        def columns(name, x):
            axes = row_axes(specs[name])
            return _zero_mean(x, axes) if axes else None

        rows = map_named(lambda name, x: _zero_mean(x, column_axes(specs[name])), params)
        return FactoredState(jnp.zeros((), jnp.int32), rows, map_named(columns, params))

    def update(grads, state: FactoredState, params=None):
        updates = state.updates + 1
        decay = jnp.minimum(1 - updates.astype(jnp.float32) ** -POWER, ceiling)

        def ema_update(old, grad, axes):
            return decay * old + (1 - decay) * jnp.mean(grad * grad + EPSILON, axis=axes)

        def rows_of(name, grad, old):
            return ema_update(old, grad, column_axes(specs[name]))

        def columns_of(name, grad, old):
            return None if old is None else ema_update(old, grad, row_axes(specs[name]))

        rows = map_named(rows_of, grads, state.rows)
        columns = map_named(columns_of, grads, state.columns)
        divided = map_named(lambda name, *xs: _divide(specs[name], *xs), grads, rows, columns)
        return divided, FactoredState(updates, rows, columns)

    return optax.GradientTransformation(init, update)


def _divide(spec: ParamSpec, grad: jax.Array, rows: jax.Array, columns: jax.Array | None):
    """Divides the gradient by the root of its second moment, rows * columns / mean(rows)."""
    if columns is None:
        return grad * jax.lax.rsqrt(rows)
    over_rows, over_columns = row_axes(spec), column_axes(spec)
    rows = rows / jnp.mean(rows, axis=over_rows, keepdims=True)
    rows, columns = jnp.expand_dims(rows, over_columns), jnp.expand_dims(columns, over_rows)
    return grad * jax.lax.rsqrt(rows) * jax.lax.rsqrt(columns)


def row_axes(spec: ParamSpec) -> tuple[int, ...]:
    """Axes of a tensor that are a matrix's rows; () if the tensor is not factored."""
    return tuple(spec.contract_axes) if spec.use in FACTORED_USES else ()


def column_axes(spec: ParamSpec) -> tuple[int, ...]:
    """Axes of a tensor that are a matrix's columns; none of a tensor that is not factored."""
    return tuple(spec.output_axes) if spec.use in FACTORED_USES else ()


def _zero_mean(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Zeros of the shape and sharding of a mean over these axes."""
    return jnp.zeros_like(jax.eval_shape(lambda x: jnp.mean(x, axis=axes), x))
