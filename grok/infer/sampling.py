"""From logits to the next token: temperature, nucleus, greedy.

Letters: B rows, V vocab.
"""

import jax
import jax.numpy as jnp

REMOVED = -1e10


def nucleus(logits_BV: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """Logits with all but each row's nucleus set to -1e10, float32.

    The release's definition: going up from the least likely token, the first whose cumulative
    probability reaches 1 - p is the threshold; it, everything above it, and every tie with it
    stay. p = 0 keeps the most likely token and its ties, p = 1 keeps all. The release sums in the
    logits' own type, which for bfloat16 filters nothing at p = 0.999; this sums in float32.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    ascending_BV = jnp.sort(logits_BV, axis=-1)
    mass_BV = jnp.cumsum(jax.nn.softmax(ascending_BV, axis=-1), axis=-1)
    reached_BV = mass_BV >= 1 - top_p_B[:, None]
    # Rounding may leave the whole sum a little under 1: the last place always counts as reached.
    place_B = jnp.where(reached_BV[:, -1], jnp.argmax(reached_BV, axis=-1), logits_BV.shape[-1] - 1)
    threshold_B1 = jnp.take_along_axis(ascending_BV, place_B[:, None], axis=-1)
    return jnp.where(logits_BV >= threshold_B1, logits_BV, REMOVED)


def sample(
    keys_B: jax.Array, logits_BV: jax.Array, temperature_B: jax.Array, top_p_B: jax.Array
) -> jax.Array:
    """One token a row, tokens_B int32: the likeliest where temperature is 0, drawn elsewhere.

    Each row is drawn with its own key, so that a row's token does not depend on its neighbours.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    greedy_B = jnp.argmax(logits_BV, axis=-1)
    heat_B = jnp.where(temperature_B > 0, temperature_B, 1)
    kept_BV = nucleus(logits_BV / heat_B[:, None], top_p_B)
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, kept_BV)
    return jnp.where(temperature_B > 0, drawn_B, greedy_B).astype(jnp.int32)
