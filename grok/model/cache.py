"""The key/value cache of decoding: one plain dataclass, donated from step to step.

Letters: L layers, B rows, S places for tokens, K kv heads, H head_dim.
"""

import dataclasses

import jax
import jax.numpy as jnp

from grok import sharding
from grok.config import GrokConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class KVCache:
    """Keys and values of every token seen so far, and how many those are in each row."""

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array
    length_B: jax.Array


def init_cache(config: GrokConfig, batch: int, capacity: int) -> KVCache:
    """An empty cache for `batch` rows of up to `capacity` tokens, in the compute type."""
    shape = (config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim)
    axes = ("layers", "batch", None, sharding.kv_axis(config.num_kv_heads), None)

    def zeros() -> jax.Array:
        return sharding.shard(jnp.zeros(shape, config.compute_dtype), *axes)

    return KVCache(zeros(), zeros(), sharding.shard(jnp.zeros((batch,), jnp.int32), "batch"))
