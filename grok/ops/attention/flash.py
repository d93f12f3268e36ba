"""Attention of rows over themselves on TPU, by blocks (Dao et al. 2022): JAX's splash kernel, or
with a temperature, which that one lacks, the kernels in `grok.ops.attention.flash_kernels`.

Letters: B batch, T length, N heads, K kv heads, G = N/K, H head_dim.
"""

from typing import Any

import jax
import jax.numpy as jnp

from grok.hardware import LANES, has_small_vmem
from grok.ops.attention.causal import temperature
from grok.ops.attention.flash_blocks import Terms
from grok.ops.attention.flash_kernels import flash_with_temperature
from grok.ops.pallas import splash_attention as splash

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
    temperature_length: int | None = None,
    positions_BT: Any = None,  # an array where there is a temperature
    interpret: Any = False,
) -> jax.Array:
    """`attention_reference` of queries and keys of the same tokens, o_BTNH.

    No array of T x T exists, keys are not repeated for the heads that share them, and blocks that
    are masked as a whole are skipped. T must be one that `supports` takes. Heads are padded to
    whole lanes, which a TPU multiplies anyway. A temperature goes by `positions_BT`, those of
    tokens in their documents. The kernel needs a `shard_map` with check_vma=False.
    """
    H = q_BTNH.shape[3]
    padding = [(0, 0)] * 3 + [(0, -H % LANES)]
    q_BTNH, k_BTKH, v_BTKH = (jnp.pad(x, padding) for x in (q_BTNH, k_BTKH, v_BTKH))
    terms = Terms(scale, softcap, window, interpret)
    if temperature_length is None:
        return _splash(q_BTNH, k_BTKH, v_BTKH, segment_BT, terms)[..., :H]
    rows = temperature(positions_BT, temperature_length), segment_BT
    return _flash_with_temperature(q_BTNH, k_BTKH, v_BTKH, *rows, terms)[..., :H]


def _splash(q_BTNH, k_BTKH, v_BTKH, segment_BT, terms: Terms) -> jax.Array:
    """Attention by JAX's kernel, o_BTNH."""
    T, N, H = q_BTNH.shape[1:]
    largest = BLOCK_SIZES[0] if H <= LANES or not has_small_vmem() else BLOCK_SIZES[1]
    block = next(size for size in BLOCK_SIZES if size <= largest and T % size == 0)
    sizes = "block_q block_kv block_q_dkv block_kv_dkv block_q_dq block_kv_dq".split()
    block_sizes: Any = dict.fromkeys(sizes, block)
    mask: Any = splash.CausalMask((T, T))
    if terms.window is not None and terms.window < T:
        # Earlier keys and later keys that are seen, and a shift.
        mask = splash.LocalMask((T, T), (terms.window - 1, 0), 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * N),
        block_sizes=splash.BlockSizes(**block_sizes),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=terms.softcap,
        residual_checkpoint_name="attention",
        interpret=terms.interpret,
    )

    def attend_row(q_TNH, k_TKH, v_TKH, segment_T):
        # The kernel caps its logits but does not scale them.
        q_TNH = (q_TNH.astype(jnp.float32) * terms.scale).astype(q_TNH.dtype)
        heads_first = (jnp.swapaxes(x, 0, 1) for x in (q_TNH, k_TKH, v_TKH))
        o_NTH = kernel(*heads_first, segment_ids=splash.SegmentIds(segment_T, segment_T))
        return jnp.swapaxes(o_NTH, 0, 1)

    return jax.vmap(attend_row)(q_BTNH, k_BTKH, v_BTKH, segment_BT)


def _flash_with_temperature(
    q_BTNH, k_BTKH, v_BTKH, temperature_BT, segment_BT, terms: Terms
) -> jax.Array:
    """Attention by our kernels, o_BTNH."""
    B, T, N, H = q_BTNH.shape
    k_BKTH, v_BKTH = (jnp.swapaxes(x, 1, 2) for x in (k_BTKH, v_BTKH))
    K = k_BKTH.shape[1]
    q_BKGTH = jnp.swapaxes(q_BTNH, 1, 2).reshape(B, K, N // K, T, H)
    o_BKGTH = flash_with_temperature(q_BKGTH, k_BKTH, v_BKTH, temperature_BT, segment_BT, terms)
    return jnp.swapaxes(o_BKGTH.reshape(B, N, T, H), 1, 2)
