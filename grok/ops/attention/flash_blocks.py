"""Blocks of queries and keys, as the kernels of flash attention have them.

Letters: B batch, T length, K kv heads, G queries a kv head, H head_dim, Q queries of a block and C
keys of a block, R = G*Q.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grok.hardware import LANES
from grok.ops.pallas import pl, pltpu

MAX_BLOCK_ROWS = 1024  # queries of all heads that share keys
MAX_BLOCK_LOGITS = 512 * 1024  # an array of them in float32 takes 2 MiB of vector memory
# Vector memory to ask for: what every generation has, and more for more than 32 heads a kv head.
MIN_VMEM_LIMIT_BYTES, VMEM_BYTES_PER_ROW = 16 * 2**20, 4 * 2**10
PAIR_SHIFT = 16  # a pair of blocks is one int32, to fit 131072 tokens into scalar memory


class Terms(NamedTuple):
    """Static terms of the logits, and how the kernels run."""

    scale: float
    softcap: float | None
    window: int | None
    interpret: Any = False


class Blocks(NamedTuple):
    """Sizes of the arrays and of the blocks."""

    B: int
    K: int
    G: int
    T: int
    H: int
    Q: int
    C: int
    terms: Terms

    @classmethod
    def of(cls, q_BKGTH: jax.Array, terms: Terms) -> "Blocks":
        """Blocks as large as vector memory allows, and that T is a multiple of."""
        B, K, G, T, H = q_BKGTH.shape
        sizes = [size for size in (1024, 512, 256, LANES) if T % size == 0]
        Q = next((size for size in sizes if G * size <= MAX_BLOCK_ROWS), LANES)
        C = next((size for size in sizes if size * G * Q <= MAX_BLOCK_LOGITS), LANES)
        return cls(B, K, G, T, H, Q, C, terms)

    @property
    def R(self) -> int:
        """Queries of a block, of all heads that share keys."""
        return self.G * self.Q

    def pairs(self, by_key: bool = False) -> np.ndarray:
        """Pairs of blocks with a query that sees a key, in order of the query blocks, or of the key
        blocks: the number of the former in the high bits, that of the latter in the low ones."""
        window = self.T if self.terms.window is None else self.terms.window
        query = np.arange(0, self.T, self.Q)[:, None]
        key = np.arange(0, self.T, self.C)[None, :]
        seen = (key < query + self.Q) & (key + self.C > query - window + 1)
        query, key = np.nonzero(seen)
        order = np.lexsort((query, key)) if by_key else slice(None)
        return (query << PAIR_SHIFT | key)[order].astype(np.int32)

    def specs(self) -> "dict[str, pl.BlockSpec]":
        """Blocks of the arrays of each side: by heads, or the same for all heads."""
        G, Q, C, H = self.G, self.Q, self.C, self.H
        return {
            "heads": pl.BlockSpec(
                (None, None, G, Q, H), lambda b, k, i, pairs: (b, k, 0, query_of(pairs[i]), 0)
            ),
            "heads_stat": pl.BlockSpec(
                (None, None, G, Q), lambda b, k, i, pairs: (b, k, 0, query_of(pairs[i]))
            ),
            "keys": pl.BlockSpec(
                (None, None, C, H), lambda b, k, i, pairs: (b, k, key_of(pairs[i]), 0)
            ),
            "query_row": pl.BlockSpec(
                (None, 1, Q), lambda b, k, i, pairs: (b, 0, query_of(pairs[i]))
            ),
            "key_row": pl.BlockSpec((None, 1, C), lambda b, k, i, pairs: (b, 0, key_of(pairs[i]))),
        }

    def call(self, kernel, pairs: np.ndarray, *, matmuls: int, operands, results, sides, scratch):
        """Runs `kernel` on every pair of blocks of every row and kv head."""
        specs = self.specs()
        inputs = ["heads", "keys", "keys", "query_row", "query_row", "key_row"]
        inputs += ["heads", "heads_stat", "heads_stat"][: len(operands) - len(inputs)]
        steps = self.B * self.K * len(pairs)
        streamed = 2 * steps * operands[1].dtype.itemsize * self.H
        streamed *= self.R if sides[0] == "keys" else self.C
        arrays = [*operands, *results]
        return pl.pallas_call(
            functools.partial(kernel, self),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(self.B, self.K, len(pairs)),
                in_specs=[specs[name] for name in inputs],
                out_specs=[specs[name] for name in sides],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=max(MIN_VMEM_LIMIT_BYTES, VMEM_BYTES_PER_ROW * self.R),
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * matmuls * steps * self.R * self.C * self.H,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays) + streamed,
                transcendentals=2 * steps * self.R * self.C,
            ),
            interpret=self.terms.interpret,
            name=kernel.__name__.strip("_").replace("_kernel", "_flash_attention"),
        )(pairs, *operands)

    def rows(self, ref) -> jax.Array:
        """A block of one number a query, or a query and head, along lanes, (1, R)."""
        parts = [ref[g : g + 1] for g in (g % ref.shape[0] for g in range(self.G))]
        return jnp.concatenate(parts, axis=1)


def query_of(pair) -> jax.Array:
    """The block of queries of a pair."""
    return pair >> PAIR_SHIFT


def key_of(pair) -> jax.Array:
    """The block of keys of a pair."""
    return pair & (2**PAIR_SHIFT - 1)


def begins(pairs, side) -> jax.Array:
    """True at the first of the steps of a block of a side, `query_of` or `key_of`."""
    i = pl.program_id(2)
    return (i == 0) | (side(pairs[jnp.maximum(i - 1, 0)]) != side(pairs[i]))


def ends(pairs, side) -> jax.Array:
    """True at the last of the steps of a block of a side, `query_of` or `key_of`."""
    i, last = pl.program_id(2), pl.num_programs(2) - 1
    return (i == last) | (side(pairs[jnp.minimum(i + 1, last)]) != side(pairs[i]))
