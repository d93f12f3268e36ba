"""Pages of int8 keys and values with a float32 scale for each token and head.

A page has its tokens side by side for each head, (K, 2, S, H), keys first, so that a kernel reads
those of a head as one block. Its scales are one row of whole lanes for each head, (K, T): those of
keys at the row's beginning, those of values from its middle on. Narrower rows would have XLA turn
the array for every layer.

Letters: U blocks of Q tokens, L layers, P pages of S tokens, M pages of the longest sequence,
K kv heads, H head_dim, T lanes.
"""

import jax
import jax.numpy as jnp

from grok.hardware import LANES


def scale_lanes(page_size: int) -> int:
    """T, the length of a row of scales."""
    return -(-2 * page_size // LANES) * LANES


def quantize_tokens(new: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 values of (..., H), and scales (...): a 127th of the largest magnitude."""
    new = new.astype(jnp.float32)
    largest = jnp.max(jnp.abs(new), axis=-1)
    scale = largest / 127
    return jnp.rint(new / jnp.where(largest > 0, scale, 1)[..., None]).astype(jnp.int8), scale


def write_int8_pages(
    kv_LPK2SH, scale_LPKT, new_UQK2H, layer, page_UQ, offset_UQ
) -> tuple[jax.Array, jax.Array]:
    """Writes a token each to place `offset_UQ` of page `page_UQ` of `layer`; nothing where there is
    no such page."""
    L, P, K, _, S, H = kv_LPK2SH.shape
    T = scale_LPKT.shape[-1]
    values, scale_UQK2 = quantize_tokens(new_UQK2H)
    # Rows of one array of rows: then the compiler updates them in place.
    page_UQ11 = jnp.where(page_UQ < P, layer * P + page_UQ, L * P)[..., None, None]
    head_UQK1 = page_UQ11 * K + jnp.arange(K)[None, None, :, None]
    value_1112, place_UQ11 = jnp.arange(2)[None, None, None, :], offset_UQ[..., None, None]
    row_UQK2 = (head_UQK1 * 2 + value_1112) * S + place_UQ11
    lane_UQ12 = value_1112 * (T // 2) + place_UQ11
    rows = kv_LPK2SH.reshape(-1, H).at[row_UQK2].set(values, mode="drop")
    scales = scale_LPKT.reshape(-1, T).at[head_UQK1, lane_UQ12].set(scale_UQK2, mode="drop")
    return rows.reshape(kv_LPK2SH.shape), scales.reshape(scale_LPKT.shape)


def read_int8_pages(kv_LPK2SH, scale_LPKT, layer, pages_UM, key_or_value: int) -> jax.Array:
    """Keys (0) or values (1) in some pages of each block, x_UMSKH in float32."""
    S, T = kv_LPK2SH.shape[4], scale_LPKT.shape[-1]
    values_UMKSH = kv_LPK2SH.at[layer, pages_UM, :, key_or_value].get(mode="clip")
    first = key_or_value * (T // 2)
    scale_UMKS = scale_LPKT.at[layer, pages_UM, :, first : first + S].get(mode="clip")
    x_UMKSH = values_UMKSH.astype(jnp.float32) * scale_UMKS[..., None]
    return jnp.swapaxes(x_UMKSH, 2, 3)
