"""Causal grouped-query attention with a tanh soft-cap.

Letters: B batch, T query length, S key length, K kv heads, G queries a kv head, N = K*G heads,
H head_dim.
"""

import functools

import jax
import jax.numpy as jnp

MASKED = -1e30
CHUNK = 512


def softcap(logits: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(logits / cap): near the identity, never beyond the cap."""
    return cap * jnp.tanh(logits / cap)


def attention_reference(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    index_BT: jax.Array,
    segment_BT: jax.Array,
    segment_BS: jax.Array,
    *,
    multiplier: float,
    cap: float,
) -> jax.Array:
    """Attention of each query over the keys of its segment that are not behind it, o_BTNH.

    `index_BT` is each query's place among the S keys; key s is seen when s <= index and both
    segments are equal. Logits and softmax are float32, products take the type of `q_BTNH`.
    Holds the whole (B, N, T, S) of logits.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    logits = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    logits = softcap(logits * multiplier, cap)
    seen_BTS = (jnp.arange(S)[None, None, :] <= index_BT[:, :, None]) & (
        segment_BT[:, :, None] == segment_BS[:, None, :]
    )
    logits = jnp.where(seen_BTS[:, None, None], logits, MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v_BSKH).reshape(B, T, N, H)


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    index_BT: jax.Array,
    segment_BT: jax.Array,
    segment_BS: jax.Array,
    *,
    multiplier: float,
    cap: float,
) -> jax.Array:
    """What `attention_reference` computes, by chunks of queries where T is long.

    At most (B, N, CHUNK, S) of logits exist at a time; backward computes them again.
    """
    form = functools.partial(attention_reference, multiplier=multiplier, cap=cap)
    B, T = index_BT.shape
    if T <= CHUNK or T % CHUNK:
        return form(q_BTNH, k_BSKH, v_BSKH, index_BT, segment_BT, segment_BS)

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(B, T // CHUNK, CHUNK, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one_chunk(chunk):
        q, index, segment = chunk
        return form(q, k_BSKH, v_BSKH, index, segment, segment_BS)

    o = jax.lax.map(one_chunk, (split(q_BTNH), split(index_BT), split(segment_BT)))
    return jnp.moveaxis(o, 0, 1).reshape(q_BTNH.shape)
