"""Checks of the kernels of attention, of rows over themselves and over a paged cache.

Letters: B rows, T length, N heads, K kv heads, H head_dim; of a paged cache U sequences of Q new
tokens, L layers, S tokens of a page, M pages of the longest sequence.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from grok.calibrate.check import Sizes, normal, with_terms
from grok.ops.attention.causal import attention_reference
from grok.ops.attention.flash import flash_attention
from grok.ops.attention.int8_pages import scale_lanes
from grok.ops.attention.paged import paged_attention, paged_attention_reference, write_pages
from grok.ops.attention.ragged import ragged_attention

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 128
SCALE, SOFTCAP = 0.3, 5.0  # logits of several units: the softcap matters


# Attention of rows over themselves: three documents, then padding.


def _flash_inputs(sizes: Sizes) -> tuple:
    """q, k, v, segments and positions."""
    T = sizes.length
    heads = HEADS, KV_HEADS, KV_HEADS
    q, k, v = normal(sizes, *((1, T, n, HEAD_DIM) for n in heads))
    starts = jnp.asarray([0, T // 2 - 2, T // 2 + T // 10, T - T // 9])
    document_T = jnp.searchsorted(starts, jnp.arange(T), side="right") - 1
    return q, k, v, ((document_T + 1) % 4)[None], (jnp.arange(T) - starts[document_T])[None]


def _attention_gradients(attend, q, k, v) -> dict[str, jax.Array]:
    """The result o, and gradients of a sum of it with factors between -1 and 1."""

    def loss(q, k, v):
        o = attend(q, k, v)
        factors = jnp.cos(jnp.arange(o.size, dtype=jnp.float32)).reshape(o.shape)
        return jnp.sum(o.astype(jnp.float32) * factors), o

    (dq, dk, dv), o = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return {"o": o, "dq": dq, "dk": dk, "dv": dv}


def _flash(q, k, v, segment, positions, interpret, **terms):
    options = {"scale": SCALE, "softcap": SOFTCAP, "positions_BT": positions, **terms}

    def attend(q, k, v):
        return flash_attention(q, k, v, segment, interpret=interpret, **options)

    return _attention_gradients(attend, q, k, v)


def _flash_reference(q, k, v, segment, positions, **terms):
    index_BT = jnp.arange(q.shape[1])[None]
    options = {"scale": SCALE, "softcap": SOFTCAP, **terms}

    def attend(q, k, v):
        return attention_reference(q, k, v, index_BT, segment, segment, positions, **options)

    return _attention_gradients(attend, q, k, v)


# Attention over pages: new tokens of four sequences, some at the begin or the end of a page.


def _paged_inputs(sizes: Sizes, queries: int, dtype: str = "") -> tuple:
    """q_UQNH, pages and their scales, the layer, the table and the positions of the first
    tokens."""
    S, M, U, L = sizes.page_size, sizes.pages, 4, 2
    new = normal(sizes, (U, queries, HEADS, HEAD_DIM), (U, M * S, KV_HEADS, 2, HEAD_DIM))
    last = M * S - queries
    start_U = jnp.asarray([0, S - 1, S, last], jnp.int32)
    table_UM = jnp.arange(U * M, dtype=jnp.int32)[::-1].reshape(U, M)
    page, scale = (S, KV_HEADS, 2, HEAD_DIM), None
    if dtype == "int8":
        page = (KV_HEADS, 2, S, HEAD_DIM)
        scale = jnp.zeros((L, U * M, KV_HEADS, scale_lanes(S)), jnp.float32)
    kv = jnp.zeros((L, U * M, *page), dtype or sizes.dtype)
    zeros_U, all_U = jnp.zeros(U, jnp.int32), jnp.full(U, M * S, jnp.int32)
    layer = jnp.int32(1)
    kv, scale = write_pages(kv, scale, layer, new[1], table_UM, zeros_U, all_U)
    return new[0], kv, scale, layer, table_UM, start_U


def _decode_inputs(sizes: Sizes, dtype: str = "") -> tuple:
    return _paged_inputs(sizes, 1, dtype)


def _prompt_inputs(sizes: Sizes, dtype: str = "") -> tuple:
    return _paged_inputs(sizes, sizes.prompt, dtype)


def _ragged(q, kv, scale, layer, table, start, interpret, **terms):
    options = {"scale": SCALE, "softcap": SOFTCAP, **terms}
    attend: Callable = functools.partial(ragged_attention, interpret=interpret, **options)
    return {"o": attend(q, kv, scale, layer, table, start)}


def _paged(q, kv, scale, layer, table, start, interpret, **terms):
    options = {"scale": SCALE, "softcap": SOFTCAP, **terms}
    count = jnp.full_like(start, q.shape[1])
    return {"o": paged_attention(q, kv, scale, layer, table, start, count, **options)}


def _paged_reference(q, kv, scale, layer, table, start, **terms):
    options = {"scale": SCALE, "softcap": SOFTCAP, **terms}
    return {"o": paged_attention_reference(q, kv, scale, layer, table, start, **options)}


WINDOWED, WARM = {"window": 17}, {"temperature_length": 12}
_FLASH = tuple(
    with_terms(
        f"flash_attention{label}, with gradients", _flash_inputs, _flash, _flash_reference, **terms
    )
    for label, terms in (
        ("", {}),
        (", window", WINDOWED),
        (", temperature", WARM),
        (", window and temperature", WINDOWED | WARM),
    )
)
_INT8_DECODE, _INT8_PROMPT = (
    functools.partial(inputs, dtype="int8") for inputs in (_decode_inputs, _prompt_inputs)
)
_RAGGED = tuple(
    with_terms(f"ragged_attention, {label}", inputs, _ragged, _paged_reference, **terms)
    for label, inputs, terms in (
        ("decode", _decode_inputs, {}),
        ("prompt", _prompt_inputs, {}),
        ("decode, window", _decode_inputs, WINDOWED),
        ("prompt, window", _prompt_inputs, WINDOWED),
        ("decode, temperature", _decode_inputs, WARM),
        ("prompt, temperature", _prompt_inputs, WARM),
        ("decode, int8 pages", _INT8_DECODE, {}),
        ("prompt, int8 pages, window and temperature", _INT8_PROMPT, WINDOWED | WARM),
    )
)
_PAGED = tuple(
    with_terms(f"paged_attention, {label}", inputs, _paged, _paged_reference, **terms)
    for label, inputs, terms in (
        ("decode", _decode_inputs, {}),
        ("prompt, window and temperature", _prompt_inputs, WINDOWED | WARM),
        ("decode, int8 pages", _INT8_DECODE, {}),
    )
)
# JAX's kernel copies to views of memory that its interpreters do not know.
_JAX_RAGGED = {"ragged_attention, decode", "ragged_attention, prompt"}

CHECKS = (
    *_FLASH,
    *(check._replace(can_interpret=check.name not in _JAX_RAGGED) for check in _RAGGED),
    *(check._replace(is_pallas=False) for check in _PAGED),
)
