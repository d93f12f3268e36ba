"""Causal grouped-query attention with a tanh soft-cap.

Letters: B batch, T query length, S key length, K kv heads, G queries a kv head, N = K*G heads,
H head_dim.
"""

import functools

import jax
import jax.numpy as jnp

from grok.ops.softcap import apply_softcap

MASKED_LOGIT = -1e30
QUERY_BLOCK = 512  # queries of which logits exist at a time


def attention_reference(
    q_BTNH, k_BSKH, v_BSKH, index_BT, segment_BT, segment_BS, *, scale: float, softcap: float | None
) -> jax.Array:
    """Attention of each query over the earlier keys of its segment and itself, o_BTNH.

    `index_BT` is each query's index among the S keys; it sees key s if s <= index and both segments
    are equal. Logits and softmax are float32, products take the type of `q_BTNH`. All (B, N, T, S)
    logits exist at once.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    logits = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    logits = apply_softcap(logits * scale, softcap)
    mask_BTS = (jnp.arange(S)[None, None, :] <= index_BT[:, :, None]) & (
        segment_BT[:, :, None] == segment_BS[:, None, :]
    )
    logits = jnp.where(mask_BTS[:, None, None], logits, MASKED_LOGIT)
    weights = jax.nn.softmax(logits, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v_BSKH).reshape(B, T, N, H)


@jax.named_scope("attention")
def attention(
    q_BTNH, k_BSKH, v_BSKH, index_BT, segment_BT, segment_BS, *, scale: float, softcap: float | None
) -> jax.Array:
    """`attention_reference`, by blocks of queries where T is long.

    At most (B, N, QUERY_BLOCK, S) logits exist at a time; the backward pass computes them again.
    """
    attend = functools.partial(attention_reference, scale=scale, softcap=softcap)
    B, T = index_BT.shape
    if T <= QUERY_BLOCK or T % QUERY_BLOCK:
        return attend(q_BTNH, k_BSKH, v_BSKH, index_BT, segment_BT, segment_BS)

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(B, T // QUERY_BLOCK, QUERY_BLOCK, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def attend_block(block):
        q, index, segment = block
        return attend(q, k_BSKH, v_BSKH, index, segment, segment_BS)

    o = jax.lax.map(attend_block, (split(q_BTNH), split(index_BT), split(segment_BT)))
    return jnp.moveaxis(o, 0, 1).reshape(q_BTNH.shape)
