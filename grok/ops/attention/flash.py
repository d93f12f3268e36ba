"""Attention of rows over themselves on TPU: JAX's splash kernel, by blocks (Dao et al. 2022).

Letters: B batch, T length, N heads, K kv heads, H head_dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from grok.hardware import LANES

BLOCK_SIZES = (1024, 512, 256, 128)  # tokens; the largest that divides a row is taken


def supports(length: int) -> bool:
    """True if the kernel takes rows of this length."""
    return length % LANES == 0


@jax.named_scope("flash_attention")
def flash_attention(
    q_BTNH,
    k_BTKH,
    v_BTKH,
    segment_BT,
    *,
    scale: float,
    softcap: float | None,
    window: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`attention_reference` of queries and keys of the same tokens, o_BTNH.

    No array of T x T exists, keys are not repeated for the heads that share them, and blocks that
    are masked as a whole are skipped. T must be one that `supports` takes. Heads are padded to
    whole lanes, which a TPU multiplies anyway. The kernel needs a `shard_map` with check_vma=False.
    """
    T, N, H = q_BTNH.shape[1:]
    padding = [(0, 0)] * 3 + [(0, -H % LANES)]
    q_BTNH, k_BTKH, v_BTKH = (jnp.pad(x, padding) for x in (q_BTNH, k_BTKH, v_BTKH))
    block = next(size for size in BLOCK_SIZES if T % size == 0)
    sizes = "block_q block_kv block_q_dkv block_kv_dkv block_q_dq block_kv_dq".split()
    block_sizes: Any = dict.fromkeys(sizes, block)
    mask: Any = splash.CausalMask((T, T))
    if window is not None and window < T:
        mask = splash.LocalMask((T, T), (window - 1, 0), 0)  # earlier keys, later keys, shift
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * N),
        block_sizes=splash.BlockSizes(**block_sizes),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )

    def attend_row(q_TNH, k_TKH, v_TKH, segment_T):
        # The kernel caps its logits but does not scale them.
        q_TNH = (q_TNH.astype(jnp.float32) * scale).astype(q_TNH.dtype)
        heads_first = (jnp.swapaxes(x, 0, 1) for x in (q_TNH, k_TKH, v_TKH))
        o_NTH = kernel(*heads_first, segment_ids=splash.SegmentIds(segment_T, segment_T))
        return jnp.swapaxes(o_NTH, 0, 1)

    return jax.vmap(attend_row)(q_BTNH, k_BTKH, v_BTKH, segment_BT)[..., :H]
