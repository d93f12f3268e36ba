"""Muon: the momentum of a matrix, orthogonalized before it is applied (Jordan et al. 2024).
Letters: R rows, C columns of one matrix: of one layer, and of one expert of a layer."""

import math

import jax
import jax.numpy as jnp
import optax

from grok import sharding
from grok.model.param_spec import ParamSpec
from grok.optim.param_groups import Specs, map_named

# Five steps of x <- a x + b (x x^T) x + c (x x^T)^2 x bring all singular values near one: Jordan's
# coefficients, the steepest at zero that stay between about 0.7 and 1.2.
STEPS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)
EPSILON = 1e-8
# Updates of this root-mean-square suit learning rate and decay of AdamW (Liu et al. 2025, 2.2).
UPDATE_RMS = 0.2


def scale_by_muon(momentum: float, specs: Specs) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalized per matrix; only for matrices of `specs`. The momentum is
    sharded as its parameter. To be orthogonalized, matrices are gathered: each on one device, if
    there are enough layers and experts for all devices."""

    def update(grads, moments, params=None):
        moments = jax.tree.map(lambda m, g: momentum * m + g, moments, grads)
        ahead = jax.tree.map(lambda m, g: momentum * m + g, moments, grads)
        return map_named(lambda name, x: _orthogonal_update(specs[name], x), ahead), moments

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def _orthogonal_update(spec: ParamSpec, x: jax.Array) -> jax.Array:
    """Orthogonalizes each matrix of a tensor, and scales it to the size of an update."""
    R, C = spec.contract_size, spec.output_size

    def local(x):
        x_RC = jax.lax.map(orthogonalize, x.reshape(-1, R, C))
        return UPDATE_RMS * math.sqrt(max(R, C)) * x_RC.reshape(x.shape)

    return sharding.map_matrices(local, x, spec.lead_dims)


def orthogonalize(x_RC: jax.Array) -> jax.Array:
    """Approximates the orthogonal matrix nearest to x_RC by Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    wide = x_RC if x_RC.shape[0] <= x_RC.shape[1] else x_RC.T
    wide /= jnp.sqrt(jnp.sum(wide * wide)) + EPSILON
    for _ in range(STEPS):
        square = wide @ wide.T
        wide = a * wide + (b * square + c * square @ square) @ wide
    return wide if wide.shape == x_RC.shape else wide.T
