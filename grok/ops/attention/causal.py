"""Causal grouped-query attention: soft-cap, temperature by position, sliding window.

Letters: B batch, T query length, S key length, K kv heads, G queries a kv head, N = K*G heads,
H head_dim.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from grok.ops.softcap import apply_softcap

MASKED_LOGIT = -1e30
QUERY_BLOCK = 512  # queries of which logits exist at a time


def temperature(positions: jax.Array, length: int) -> jax.Array:
    """Factor on a query's capped logits, float32: 1 up to position `length`, counted from 0, and
    log(position) / log(length) beyond it."""
    ratio = jnp.log2(jnp.maximum(positions, 1).astype(jnp.float32)) / math.log2(length)
    return jnp.where(positions > length, ratio, 1)


def scaled_logits(
    products_BKGTS: jax.Array,
    positions_BT,
    *,
    scale: float,
    softcap: float | None,
    temperature_length: int | None = None,
) -> jax.Array:
    """Logits from products of queries and keys: scaled, then capped, then multiplied by the
    temperature of each query's position, where there is one."""
    logits = apply_softcap(products_BKGTS * scale, softcap)
    if temperature_length is None:
        return logits
    return logits * temperature(positions_BT, temperature_length)[:, None, None, :, None]


def causal_mask(key_index: jax.Array, index: jax.Array, window: int | None) -> jax.Array:
    """True where a query at `index` sees the key at `key_index`: one of the last `window` up to its
    own, which counts; None: any of them."""
    mask = key_index <= index
    if window is not None:
        mask &= key_index > index - window
    return mask


def attention_reference(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    index_BT,
    segment_BT,
    segment_BS,
    positions_BT=None,
    *,
    window: int | None = None,
    **factors: Any,
) -> jax.Array:
    """Attention of each query over the earlier keys of its segment and itself, o_BTNH.

    `index_BT` is each query's index among the S keys; it sees key s if s <= index, within the
    window, and both segments are equal. `positions_BT` are the positions that the temperature goes
    by: of packed documents, each counts its own. `factors` are those of `scaled_logits`. Logits and
    softmax are float32, products take the type of `q_BTNH`. All (B, N, T, S) logits exist at once.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    logits = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    logits = scaled_logits(logits, positions_BT, **factors)
    mask_BTS = causal_mask(jnp.arange(S)[None, None, :], index_BT[:, :, None], window) & (
        segment_BT[:, :, None] == segment_BS[:, None, :]
    )
    logits = jnp.where(mask_BTS[:, None, None], logits, MASKED_LOGIT)
    weights = jax.nn.softmax(logits, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v_BSKH).reshape(B, T, N, H)


@jax.named_scope("attention")
def attention(
    q_BTNH, k_BSKH, v_BSKH, index_BT, segment_BT, segment_BS, positions_BT=None, **terms: Any
) -> jax.Array:
    """`attention_reference`, by blocks of queries where T is long.

    At most (B, N, QUERY_BLOCK, S) logits exist at a time; the backward pass computes them again.
    """
    attend: Any = functools.partial(attention_reference, **terms)
    B, T = index_BT.shape
    if T <= QUERY_BLOCK or T % QUERY_BLOCK:
        return attend(q_BTNH, k_BSKH, v_BSKH, index_BT, segment_BT, segment_BS, positions_BT)

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(B, T // QUERY_BLOCK, QUERY_BLOCK, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def attend_block(block):
        q, index, segment, positions = block
        return attend(q, k_BSKH, v_BSKH, index, segment, segment_BS, positions)

    queries = jax.tree.map(split, (q_BTNH, index_BT, segment_BT, positions_BT))
    o = jax.lax.map(attend_block, queries)
    return jnp.moveaxis(o, 0, 1).reshape(q_BTNH.shape)
