"""Rotary position embedding. Letters: B batch, T length, N heads, H head_dim."""

import jax
import jax.numpy as jnp

from grok.config.model import RopeConfig


def apply_rope(x_BTNH: jax.Array, positions_BT: jax.Array, config: RopeConfig) -> jax.Array:
    """Rotates queries or keys by their positions (Su et al. 2021), over the whole head.

    Element i of the first half and of the second turn together by position / theta^(2i/H);
    phases are float32.
    """
    H = x_BTNH.shape[-1]
    frequency = config.theta ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H)
    phase = positions_BT.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
    cos, sin = jnp.cos(phase), jnp.sin(phase)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)
