"""The dense gated MLP: y = down(act(gate) * up). Letters: R rows (tokens), D embed, F mlp."""

import math

import jax
import jax.numpy as jnp

from grok.ops.weights.weight import Weight, adapter, base


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """GELU by the error function, x * Phi(x). Its derivative is our own: that of JAX's `erf` cannot
    be taken inside a `shard_map` that checks varying axes."""
    return x * _normal_cdf(x)


@gelu.defjvp
def _(primals, tangents):
    (x,), (dx,) = primals, tangents
    density = math.sqrt(0.5 / math.pi) * jnp.exp(-0.5 * x * x)
    return gelu(x), dx * (_normal_cdf(x) + x * density)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(math.sqrt(0.5) * x))


def activate(x: jax.Array, activation: str) -> jax.Array:
    """GELU by its tanh approximation (Hendrycks & Gimpel 2016, section 2) or the error function, or
    SiLU."""
    if activation == "gelu":
        return gelu(x)
    return jax.nn.silu(x) if activation == "silu" else jax.nn.gelu(x)


def gated_activation(gate_RF: jax.Array, up_RF: jax.Array, activation="gelu_tanh") -> jax.Array:
    """act(gate) * up in float32."""
    return activate(gate_RF.astype(jnp.float32), activation) * up_RF.astype(jnp.float32)


def gated_mlp(
    x_RD, w_gate_DF: Weight, w_up_DF: Weight, w_down_FD: Weight, activation: str
) -> jax.Array:
    """y_RD of float matrices, with adapters or without, in the type of `x_RD`."""
    gate_RF, up_RF = _product(x_RD, w_gate_DF), _product(x_RD, w_up_DF)
    return _product(gated_activation(gate_RF, up_RF, activation).astype(x_RD.dtype), w_down_FD)


def _product(x_RD, w_DF: Weight) -> jax.Array:
    """x w in the type of x; an adapter's product is computed beside it, through the rank."""
    y_RF = x_RD @ base(w_DF)
    if (factors := adapter(w_DF)) is None:
        return y_RF
    a_Dr, b_rF = factors
    return y_RF + (x_RD @ a_Dr) @ b_rF
