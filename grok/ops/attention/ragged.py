"""Attention over keys and values in pages, on TPU: JAX's kernel for many sequences of any length.

Letters: U blocks of Q tokens, L layers, P pages of S tokens, M pages of the longest sequence,
K kv heads, N heads, H head_dim.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

from grok.ops.attention.flash import LANES

# Keys that the kernel takes at a time, and queries.
SPAN = 512
QUERIES = 32
VECTOR_MEMORY = 64 * 2**20


def suits(kv: jax.Array, head_dim: int) -> bool:
    """Whether the kernel takes pages of this type, and heads of this width; int8 pages have scales
    of every token, of which it knows nothing."""
    return kv.dtype != jnp.int8 and head_dim % LANES == 0


def ragged_attention(
    q_UQNH: jax.Array,
    kv_LPSK2H: jax.Array,
    layer: jax.Array,
    table_UM: jax.Array,
    start_U: jax.Array,
    multiplier: float,
    cap: float,
) -> jax.Array:
    """What `paged_attention_reference` computes without scales, o_UQNH.

    Pages are read where they lie, each once for a block of queries, and none beyond a sequence.
    `suits` says of which pages. Inside `shard_map` it has to be one that does not check what varies
    between devices.
    """
    U, Q, N, H = q_UQNH.shape
    L, P, S, K = kv_LPSK2H.shape[:4]
    # A block that is not full ends behind its last token, maybe beyond the table.
    table_UM = jnp.pad(table_UM, ((0, 0), (0, (Q + S - 2) // S)))
    o = ragged_paged_attention(
        q_UQNH.reshape(U * Q, N, H),
        kv_LPSK2H.reshape(L * P, S, 2 * K, H),
        start_U + Q,
        table_UM + layer * P,
        jnp.arange(U + 1, dtype=jnp.int32) * Q,
        jnp.full(1, U, jnp.int32),
        sm_scale=multiplier,
        soft_cap=cap,
        num_kv_pages_per_block=max(1, min(SPAN // S, table_UM.shape[1])),
        num_queries_per_block=min(QUERIES, U * Q),
        vmem_limit_bytes=VECTOR_MEMORY,
    )
    return o.reshape(q_UQNH.shape)
