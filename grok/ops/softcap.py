"""The soft-cap that attention, routers and final logits may have."""

import jax
import jax.numpy as jnp


def apply_softcap(logits: jax.Array, softcap: float | None) -> jax.Array:
    """softcap * tanh(logits / softcap): near the identity, never beyond it; None: no cap."""
    if softcap is None:
        return logits
    return softcap * jnp.tanh(logits / softcap)
