"""Attention over keys and values that lie in pages, and writing them there.

Letters: U blocks of Q tokens, L layers, P pages of S tokens, M pages of the longest sequence,
K kv heads, G queries a kv head, N = K*G heads, H head_dim, C keys taken at a time.
"""

import functools

import jax
import jax.numpy as jnp

from grok.ops.attention.causal import MASKED, attention_reference, softcap

# Keys of one turn of the loop: enough for the products to be worth their overhead.
SPAN = 128


def write_pages(kv, scale, layer, new_UQK2H, table_UM, start_U, count_U):
    """The first `count_U` tokens of each block put in their pages, of `layer`; returns kv, scale.

    `kv` is (L, P, S, K, 2, H); `scale` is None, or (L, P, S, K, 2) float32 where kv is int8.
    """
    pages, size = kv.shape[1:3]
    offset_UQ = jnp.arange(new_UQK2H.shape[1])[None, :]
    index_UQ = start_U[:, None] + offset_UQ
    page_UQ = jnp.take_along_axis(table_UM, index_UQ // size, axis=1, mode="clip")
    # Past the last page nothing is written.
    page_UQ = jnp.where(offset_UQ < count_U[:, None], page_UQ, pages)
    at = (layer, page_UQ, index_UQ % size)
    if scale is None:
        return kv.at[at].set(new_UQK2H.astype(kv.dtype), mode="drop"), None
    new = new_UQK2H.astype(jnp.float32)
    largest = jnp.max(jnp.abs(new), axis=-1)
    new_scale = largest / 127
    values = jnp.rint(new / jnp.where(largest > 0, new_scale, 1)[..., None]).astype(jnp.int8)
    return kv.at[at].set(values, mode="drop"), scale.at[at].set(new_scale, mode="drop")


def paged_attention_reference(
    q_UQNH, kv, scale, layer, table_UM, start_U, *, multiplier: float, cap: float, kv_head=None
) -> jax.Array:
    """Attention of each token over its sequence up to itself, o_UQNH; all pages are gathered.

    Each kv head serves N/K queries in turn; with `kv_head`, that one serves them all.
    """
    k_UCKH, v_UCKH = (_pages(kv, scale, layer, table_UM, i, kv_head, q_UQNH.dtype) for i in (0, 1))
    index_UQ = start_U[:, None] + jnp.arange(q_UQNH.shape[1])[None, :]
    ones_UC = jnp.ones(k_UCKH.shape[:2], jnp.int32)
    form = functools.partial(attention_reference, multiplier=multiplier, cap=cap)
    return form(q_UQNH, k_UCKH, v_UCKH, index_UQ, jnp.ones_like(index_UQ), ones_UC)


def paged_attention(
    q_UQNH, kv, scale, layer, table_UM, start_U, multiplier: float, cap: float, *, kv_head=None
) -> jax.Array:
    """What `paged_attention_reference` computes, with its roundings, a few pages at a time as far
    as the longest sequence here: first the softmax's maximum and sum (Milakov & Gimelshein 2018),
    then the weights, which are rounded when they are whole, and their products.

    The order of a token's sums depends on its own position only: further turns of the loops, which
    longer neighbours need, multiply by 1 and add 0.
    """
    U, Q, N, H = q_UQNH.shape
    S, K = kv.shape[2], kv.shape[3] if kv_head is None else 1
    turn = max(1, SPAN // S)
    q_UQKGH = q_UQNH.reshape(U, Q, K, N // K, H)
    index_UQ = start_U[:, None] + jnp.arange(Q, dtype=jnp.int32)[None, :]
    table_UM = jnp.pad(table_UM, ((0, 0), (0, -table_UM.shape[1] % turn)))

    def part(i, which):
        """Keys (0) or values (1) of a turn, and their positions."""
        pages = jax.lax.dynamic_slice_in_dim(table_UM, i * turn, turn, axis=1)
        index_C = i * turn * S + jnp.arange(turn * S, dtype=jnp.int32)
        return _pages(kv, scale, layer, pages, which, kv_head, q_UQNH.dtype), index_C

    def masked_logits(i):
        k_UCKH, index_C = part(i, 0)
        logits = jnp.einsum(
            "uqkgh,uckh->ukgqc", q_UQKGH, k_UCKH, preferred_element_type=jnp.float32
        )
        seen_UQC = index_C[None, None, :] <= index_UQ[:, :, None]
        return jnp.where(seen_UQC[:, None, None], softcap(logits * multiplier, cap), MASKED)

    def measure(i, carry):
        most, total = carry
        logits = masked_logits(i)
        new_most = jnp.maximum(most, jnp.max(logits, axis=-1))
        added = jnp.sum(jnp.exp(logits - new_most[..., None]), axis=-1)
        return new_most, total * jnp.exp(most - new_most) + added

    def add(i, sum_H):
        weights = jnp.exp(masked_logits(i) - most[..., None]) / total[..., None]
        v_UCKH, index_C = part(i, 1)
        # What an earlier owner left in the page may be no number, and 0 times that is none.
        past_UC = index_C[None, :] > index_UQ[:, -1:]
        v_UCKH = jnp.where(past_UC[:, :, None, None], 0, v_UCKH)
        return sum_H + jnp.einsum(
            "ukgqc,uckh->ukgqh",
            weights.astype(v_UCKH.dtype),
            v_UCKH,
            preferred_element_type=jnp.float32,
        )

    # From q, so that they are typed as different on every device, as what the loops make is.
    zeros = jnp.moveaxis(q_UQKGH, 1, 3).astype(jnp.float32) * 0
    turns = jnp.max(index_UQ) // (turn * S) + 1
    most, total = jax.lax.fori_loop(0, turns, measure, (zeros[..., 0] + MASKED, zeros[..., 0]))
    o_UKGQH = jax.lax.fori_loop(0, turns, add, zeros).astype(q_UQNH.dtype)
    return jnp.moveaxis(o_UKGQH, 3, 1).reshape(U, Q, N, H)


def _pages(kv, scale, layer, pages_UM, which, kv_head, dtype):
    """Keys (`which` = 0) or values (1) of some pages of each block, one after the other, UCKH."""
    found = kv.at[layer, pages_UM, :, :, which].get(mode="clip")
    if scale is not None:
        factor = scale.at[layer, pages_UM, :, :, which].get(mode="clip")
        found = found.astype(jnp.float32) * factor[..., None]
    if kv_head is not None:
        found = jax.lax.dynamic_slice_in_dim(found, kv_head, 1, axis=3)
    U, M, S, K, H = found.shape
    return found.astype(dtype).reshape(U, M * S, K, H)
