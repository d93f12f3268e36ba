"""Attention of rows over themselves on TPU: the splash kernel of JAX (Dao et al. 2022, by blocks).

Letters: B batch, T length, N heads, K kv heads, H head_dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

LANES = 128
BLOCKS = (1024, 512, 256, 128)


def suits(length: int) -> bool:
    """Whether the kernel takes rows of this length."""
    return length % LANES == 0


def flash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_BT: jax.Array,
    *,
    multiplier: float,
    cap: float,
    interpret: Any = False,
) -> jax.Array:
    """What `attention_reference` computes where queries and keys are the same tokens, o_BTNH.

    No array of T x T exists, and keys are not repeated for the heads that share them. Blocks of
    keys behind all queries of a block are passed over. `suits` says which lengths it takes. Heads
    are filled up with zeros to whole lanes, which a TPU multiplies anyway. Inside `shard_map` it
    has to be one that does not check what varies between devices.
    """
    T, N, H = q_BTNH.shape[1:]
    fill = [(0, 0)] * 3 + [(0, -H % LANES)]
    q_BTNH, k_BTKH, v_BTKH = (jnp.pad(x, fill) for x in (q_BTNH, k_BTKH, v_BTKH))
    block = next(size for size in BLOCKS if T % size == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask((T, T))] * N),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=cap,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )

    def one_row(q_TNH, k_TKH, v_TKH, segment_T):
        # The kernel has the cap and no multiplier, which comes before it.
        q_TNH = (q_TNH.astype(jnp.float32) * multiplier).astype(q_TNH.dtype)
        heads_first = (jnp.swapaxes(x, 0, 1) for x in (q_TNH, k_TKH, v_TKH))
        o_NTH = kernel(*heads_first, segment_ids=splash.SegmentIds(segment_T, segment_T))
        return jnp.swapaxes(o_NTH, 0, 1)

    return jax.vmap(one_row)(q_BTNH, k_BTKH, v_BTKH, segment_BT)[..., :H]
