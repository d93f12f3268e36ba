"""Rotary position embedding. Letters: B batch, T length, N heads, H head_dim."""

import math

import jax
import jax.numpy as jnp

from grok.config.model import RopeConfig


def apply_rope(x_BTNH: jax.Array, positions_BT: jax.Array, config: RopeConfig) -> jax.Array:
    """Rotates queries or keys by their positions (Su et al. 2021), over the whole head.

    Element i of the first half and of the second turn together by position * frequency i; phases
    are float32.
    """
    frequency = rope_frequencies(x_BTNH.shape[-1], config)
    phase = positions_BT.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
    cos, sin = jnp.cos(phase), jnp.sin(phase)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


def rope_frequencies(head_dim: int, config: RopeConfig) -> jax.Array:
    """Radians a position of each pair of a head, float32 (H / 2,): theta^(-2i/H).

    With scaling (Grattafiori et al. 2024, arXiv:2407.21783, and the code released with it), those
    that turn at most `low_freq_factor` times in the original context are divided by `factor`, those
    that turn `high_freq_factor` times or more stay, and those between are blended.
    """
    frequency = config.theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if (scaling := config.scaling) is None:
        return frequency
    turns = scaling.original_context_length * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    unscaled = jnp.clip((turns - low) / (high - low), 0, 1)
    return frequency * (unscaled + (1 - unscaled) / scaling.factor)
