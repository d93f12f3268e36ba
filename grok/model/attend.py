"""The key/value cache of inference, in pages, and where the tokens of a step belong in it.

A page holds S tokens of one sequence; a sequence's pages lie anywhere, in the order that its table
says. Each group of devices that sees other tokens has pages of its own.

Letters: B groups, U blocks of a step (Q tokens in a row of one sequence each), L layers, P pages,
S tokens of a page, M pages of the longest sequence, K kv heads, H head_dim.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from grok import sharding
from grok.config import GrokConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class PagedCache:
    """Keys (2: first) and values of all layers; donated from step to step.

    int8 values have float32 scales, one for each token and head of keys and of values.
    """

    kv_LPSK2H: jax.Array
    scale_LPSK2: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Places:
    """Where a step's tokens stand, int32: block u of group b holds `count_BU` real tokens, at
    `start_BU` and after in the sequence that has the pages `table_BUM`.

    A block without real tokens is one that nothing is asked of. Pages count within a group.
    """

    table_BUM: Any  # jax.Array or np.ndarray
    start_BU: Any
    count_BU: Any

    def real(self, length: int) -> jax.Array:
        """Which of the T = U * Q tokens are real."""
        return (jnp.arange(length)[None, None, :] < self.count_BU[:, :, None]).reshape(
            self.count_BU.shape[0], -1
        )

    def positions(self, length: int) -> jax.Array:
        """Position of every token in its sequence."""
        positions = self.start_BU[:, :, None] + jnp.arange(length, dtype=jnp.int32)[None, None, :]
        return positions.reshape(self.start_BU.shape[0], -1)


def init_cache(config: GrokConfig, pages: int, page_size: int, dtype: str) -> PagedCache:
    """Empty pages, `pages` over all groups, with values in `dtype`: a float type or int8."""
    shape = (config.num_layers, pages, page_size, config.num_kv_heads, 2)
    axes = ("layers", "batch", None, sharding.kv_axis(config.num_kv_heads), None)
    kv = sharding.constrain(jnp.zeros((*shape, config.head_dim), dtype), *axes, None)
    if dtype != "int8":
        return PagedCache(kv)
    return PagedCache(kv, sharding.constrain(jnp.zeros(shape, jnp.float32), *axes))
