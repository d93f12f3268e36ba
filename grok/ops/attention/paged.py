"""Attention over a paged KV cache, and writing to it.

Letters: U blocks of Q tokens, L layers, P pages of S tokens, M pages of the longest sequence,
K kv heads, G queries a kv head, N = K*G heads, H head_dim, C keys of a block.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from grok.ops.attention.causal import (
    MASKED_LOGIT,
    attention_reference,
    causal_mask,
    scaled_logits,
)
from grok.ops.attention.int8_pages import read_int8_pages, write_int8_pages

# Keys that one iteration of the loop takes: enough for the products to be worth its overhead.
KV_BLOCK = 128


@jax.named_scope("write_pages")
def write_pages(kv, kv_scale, layer, new_UQK2H, table_UM, start_U, count_U):
    """Writes the first `count_U` tokens of each block to their pages of `layer`; returns kv and
    kv_scale.

    `kv` is (L, P, S, K, 2, H) and `kv_scale` None, or as in `grok.ops.attention.int8_pages`.
    """
    num_pages, S = kv.shape[1], page_size(kv, kv_scale)
    offset_UQ = jnp.arange(new_UQK2H.shape[1])[None, :]
    index_UQ = start_U[:, None] + offset_UQ
    page_UQ = jnp.take_along_axis(table_UM, index_UQ // S, axis=1, mode="clip")
    # Writes past the last page are dropped.
    page_UQ = jnp.where(offset_UQ < count_U[:, None], page_UQ, num_pages)
    if kv_scale is not None:
        return write_int8_pages(kv, kv_scale, new_UQK2H, layer, page_UQ, index_UQ % S)
    slot = (layer, page_UQ, index_UQ % S)
    return kv.at[slot].set(new_UQK2H.astype(kv.dtype), mode="drop"), None


def page_size(kv: jax.Array, kv_scale: jax.Array | None) -> int:
    """Tokens of a page."""
    return kv.shape[2 if kv_scale is None else 4]


def paged_attention_reference(
    q_UQNH, kv, kv_scale, layer, table_UM, start_U, *, kv_head=None, **terms: Any
) -> jax.Array:
    """Attention of each token over its sequence up to itself, o_UQNH, from a copy of all its pages.

    `terms` are those of `attention_reference`; pages wholly behind the window may hold anything
    finite. Each kv head serves N/K queries in turn; with `kv_head`, that one serves them all.
    """
    read = functools.partial(_read_pages, kv, kv_scale, layer, kv_head, q_UQNH.dtype)
    k_UCKH, v_UCKH = (read(table_UM, i) for i in (0, 1))
    index_UQ = start_U[:, None] + jnp.arange(q_UQNH.shape[1])[None, :]
    segment_UC = jnp.ones(k_UCKH.shape[:2], jnp.int32)
    segments = jnp.ones_like(index_UQ), segment_UC
    return attention_reference(q_UQNH, k_UCKH, v_UCKH, index_UQ, *segments, index_UQ, **terms)


@jax.named_scope("paged_attention")
def paged_attention(
    q_UQNH, kv, kv_scale, layer, table_UM, start_U, count_U, *, kv_head=None, window=None, **factors
) -> jax.Array:
    """`paged_attention_reference`, with its roundings, in blocks of keys from the first one that a
    token here sees to the end of the longest sequence: first the softmax's maximum and sum (Milakov
    & Gimelshein 2018), then the products with the final, rounded weights.

    The order of a token's sums depends on its own position only: the further iterations that other
    blocks of queries need multiply by 1 and add 0, or come before its first key and are multiplied
    by 0. Keys that no query of a block sees may hold anything.
    """
    U, Q, N, H = q_UQNH.shape
    S, heads_dim = page_size(kv, kv_scale), 3 if kv_scale is None else 2
    K = kv.shape[heads_dim] if kv_head is None else 1
    pages_per_block = max(1, KV_BLOCK // S)
    read = functools.partial(_read_pages, kv, kv_scale, layer, kv_head, q_UQNH.dtype)
    q_UQKGH = q_UQNH.reshape(U, Q, K, N // K, H)
    index_UQ = start_U[:, None] + jnp.arange(Q, dtype=jnp.int32)[None, :]
    table_UM = jnp.pad(table_UM, ((0, 0), (0, -table_UM.shape[1] % pages_per_block)))

    def pages_of(block):
        """The block's pages, and the positions of its keys."""
        pages = jax.lax.dynamic_slice_in_dim(table_UM, block * pages_per_block, pages_per_block, 1)
        C = pages_per_block * S
        return pages, block * pages_per_block * S + jnp.arange(C, dtype=jnp.int32)

    def masked_logits(block):
        pages, index_C = pages_of(block)
        logits = jnp.einsum(
            "uqkgh,uckh->ukgqc", q_UQKGH, read(pages, 0), preferred_element_type=jnp.float32
        )
        mask = causal_mask(index_C[None, None, :], index_UQ[:, :, None], window)[:, None, None]
        return jnp.where(mask, scaled_logits(logits, index_UQ, **factors), MASKED_LOGIT)

    def weighted_values(block, weights):
        pages, index_C = pages_of(block)
        v_UCKH = read(pages, 1)
        # Stale values in a page may not be finite, and 0 times those is NaN.
        unseen_UC = index_C[None, :] > index_UQ[:, -1:]
        if window is not None:
            unseen_UC |= index_C[None, :] <= index_UQ[:, :1] - window
        v_UCKH = jnp.where(unseen_UC[:, :, None, None], 0, v_UCKH)
        weights = weights.astype(v_UCKH.dtype)
        return jnp.einsum("ukgqc,uckh->ukgqh", weights, v_UCKH, preferred_element_type=jnp.float32)

    # From q, so that they are typed as varying over devices, as what the loops make is.
    zeros = jnp.moveaxis(q_UQKGH, 1, 3).astype(jnp.float32) * 0
    first, end = _seen_blocks(index_UQ, count_U, window, pages_per_block * S)
    o_UKGQH = _two_pass_softmax(masked_logits, weighted_values, zeros, first, end)
    return jnp.moveaxis(o_UKGQH.astype(q_UQNH.dtype), 3, 1).reshape(U, Q, N, H)


def _seen_blocks(index_UQ, count_U, window: int | None, block_length: int) -> tuple[Any, Any]:
    """The first block of keys that a token sees, and the one behind the last."""
    end = jnp.max(index_UQ) // block_length + 1
    if window is None:
        return 0, end
    # Padding, which begins at position 0, does not count.
    first_U = jnp.where(count_U > 0, index_UQ[:, 0] - window + 1, jnp.iinfo(jnp.int32).max)
    return jnp.maximum(jnp.min(first_U), 0) // block_length, end


def _two_pass_softmax(masked_logits, weighted_values, zeros, first, end) -> jax.Array:
    """Sum of `weighted_values(block, softmax weights)` over the blocks from `first` to before
    `end`, float32, as `zeros` in shape."""

    def accumulate_sum(block, carry):
        largest, total = carry
        logits = masked_logits(block)
        new_largest = jnp.maximum(largest, jnp.max(logits, axis=-1))
        added = jnp.sum(jnp.exp(logits - new_largest[..., None]), axis=-1)
        return new_largest, total * jnp.exp(largest - new_largest) + added

    def accumulate_values(block, o):
        weights = jnp.exp(masked_logits(block) - largest[..., None]) / total[..., None]
        return o + weighted_values(block, weights)

    start = (zeros[..., 0] + MASKED_LOGIT, zeros[..., 0])
    largest, total = jax.lax.fori_loop(first, end, accumulate_sum, start)
    return jax.lax.fori_loop(first, end, accumulate_values, zeros)


def _read_pages(kv, kv_scale, layer, kv_head, dtype, pages_UM, key_or_value: int) -> jax.Array:
    """Keys (0) or values (1) in some pages of each block, one page after the other, x_UCKH."""
    if kv_scale is None:
        index = (layer, pages_UM, slice(None), slice(None), key_or_value)
        x_UMSKH = kv.at[index].get(mode="clip")
    else:
        x_UMSKH = read_int8_pages(kv, kv_scale, layer, pages_UM, key_or_value)
    if kv_head is not None:
        x_UMSKH = jax.lax.dynamic_slice_in_dim(x_UMSKH, kv_head, 1, axis=3)
    U, M, S, K, H = x_UMSKH.shape
    return x_UMSKH.astype(dtype).reshape(U, M * S, K, H)
