"""Attention over a paged KV cache on TPU: JAX's kernel for many sequences of any length, or with
a window, whose pages alone are worth reading, a temperature or int8 pages, `ragged_kernel`.

Letters: U blocks of Q tokens, L layers, P pages of S tokens, M pages of the longest sequence,
K kv heads, N heads, H head_dim.
"""

from typing import Any

import jax
import jax.numpy as jnp

from grok.hardware import LANES
from grok.ops.attention.paged import page_size
from grok.ops.attention.ragged_kernel import ragged_kernel
from grok.ops.pallas import ragged_paged_attention

KV_BLOCK, QUERY_BLOCK = 512, 32  # keys and queries that the kernel multiplies at a time
INT8_SUBLANES = 32  # rows of a tile of int8
VMEM_LIMIT_BYTES = 64 * 2**20


def supports(kv: jax.Array, head_dim: int) -> bool:
    """True if the kernels take pages of this type, and heads of this width: float ones are read at
    a stride, which the compiler does for one group of lanes alone."""
    if kv.dtype == jnp.int8:
        return head_dim % LANES == 0 and kv.shape[-2] % INT8_SUBLANES == 0
    return head_dim == LANES


@jax.named_scope("ragged_attention")
def ragged_attention(
    q_UQNH,
    kv,
    kv_scale,
    layer,
    table_UM,
    start_U,
    *,
    scale: float,
    softcap: float | None,
    window: int | None = None,
    temperature_length: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`paged_attention_reference`, o_UQNH.

    Pages are read in place, once for a block of queries, and none beyond the end of a sequence or
    behind its window. They must be such as `supports` takes. The kernel needs a `shard_map` with
    check_vma=False.
    """
    if kv_scale is None and window is None and temperature_length is None:
        return _jax_kernel(q_UQNH, kv, layer, table_UM, start_U, scale, softcap)
    L, P = kv.shape[:2]
    if kv_scale is None:
        pages = (kv.reshape(L * P, -1, kv.shape[-1]),)
    else:
        pages = tuple(array.reshape(L * P, *array.shape[2:]) for array in (kv, kv_scale))
    return ragged_kernel(
        q_UQNH,
        pages,
        table_UM + layer * P,
        start_U,
        page_size=page_size(kv, kv_scale),
        scale=scale,
        softcap=softcap,
        window=window,
        temperature_length=temperature_length,
        interpret=interpret,
    )


def _jax_kernel(q_UQNH, kv_LPSK2H, layer, table_UM, start_U, scale, softcap) -> jax.Array:
    """Attention by JAX's kernel, o_UQNH."""
    U, Q, N, H = q_UQNH.shape
    L, P, S, K = kv_LPSK2H.shape[:4]
    # A block that is not full ends behind its last token, maybe beyond the table.
    table_UM = jnp.pad(table_UM, ((0, 0), (0, (Q + S - 2) // S)))
    o = ragged_paged_attention.ragged_paged_attention(
        q_UQNH.reshape(U * Q, N, H),
        kv_LPSK2H.reshape(L * P, S, 2 * K, H),
        start_U + Q,
        table_UM + layer * P,
        jnp.arange(U + 1, dtype=jnp.int32) * Q,
        jnp.full(1, U, jnp.int32),
        sm_scale=scale,
        soft_cap=softcap,
        num_kv_pages_per_block=max(1, min(KV_BLOCK // S, table_UM.shape[1])),
        num_queries_per_block=min(QUERY_BLOCK, U * Q),
        vmem_limit_bytes=VMEM_LIMIT_BYTES,
    )
    return o.reshape(q_UQNH.shape)
