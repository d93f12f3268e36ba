"""Pages as a TPU kernel copies them from HBM, and the keys and values that it reads from them.

Letters: P pages of S tokens, K kv heads, H head_dim, T lanes of a row of scales; C keys of a block.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from grok.ops.pallas import pl, pltpu


class PageReader(Protocol):
    """Layout of pages."""

    @property
    def num_kv_heads(self) -> int:
        """K."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token's keys and values."""

    @property
    def kernel_name(self) -> str:
        """Name of the kernel that reads such pages, in profiles and plans."""

    def scratch(self, pages: int) -> tuple[list[Any], list[Any]]:
        """Two buffers of `pages` pages for each array, and arrays to work with."""

    def open(self, buffers: Sequence[Any], workspace: Sequence[Any]) -> Callable:
        """Reads pages that were copied to `buffers`: a function of the number of a kv head that
        returns k_CH, v_CH, and their scales k_1C and v_1C, or None and None."""


def page_reader(pages: tuple[jax.Array, ...], page_size: int) -> PageReader:
    """Reader of an array of float pages, or of int8 pages and their scales."""
    if len(pages) == 1:
        _, rows, H = pages[0].shape
        return FloatPages(page_size, rows // (2 * page_size), H, pages[0].dtype)
    kv_PK2SH, scale_PKT = pages
    _, K, _, S, H = kv_PK2SH.shape
    return Int8Pages(S, K, H, scale_PKT.shape[-1])


@dataclasses.dataclass(frozen=True)
class FloatPages:
    """Pages (S*2*K, H): a token's key and value of the first kv head, those of the next, then the
    next token's."""

    page_size: int
    num_kv_heads: int
    head_dim: int
    dtype: Any
    kernel_name: str = "paged_attention_with_window"

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token's keys and values."""
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def scratch(self, pages: int) -> tuple[list[Any], list[Any]]:
        """Two blocks of pages, and one in float32."""
        rows = self.page_size * 2 * self.num_kv_heads
        block = pltpu.VMEM((2, pages, rows, self.head_dim), self.dtype)
        return [block], [pltpu.VMEM((pages * rows, self.head_dim), jnp.float32)]

    def open(self, buffers: Sequence[Any], workspace: Sequence[Any]) -> Callable:
        """Keys and values of a head, in float32, without scales."""
        (pages_ref,), (rows_ref,) = buffers, workspace
        # In float32, rows can be read at a stride.
        rows_ref[...] = pages_ref[...].astype(jnp.float32).reshape(rows_ref.shape)
        stride = 2 * self.num_kv_heads
        tokens = rows_ref.shape[0] // stride

        def read(head: int):
            k_CH, v_CH = (rows_ref[pl.ds(2 * head + i, tokens, stride)] for i in range(2))
            return k_CH, v_CH, None, None

        return read


@dataclasses.dataclass(frozen=True)
class Int8Pages:
    """Pages (K, 2, S, H) and (K, T), as of `grok.ops.attention.int8_pages`."""

    page_size: int
    num_kv_heads: int
    head_dim: int
    lanes: int
    kernel_name: str = "paged_attention_int8"

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token's keys and values, and of its share of the rows of scales."""
        row = 4 * self.lanes // self.page_size
        return self.num_kv_heads * (2 * self.head_dim + row)

    def scratch(self, pages: int) -> tuple[list[Any], list[Any]]:
        """Two blocks of pages and of their scales."""
        K, S, H = self.num_kv_heads, self.page_size, self.head_dim
        return [
            pltpu.VMEM((2, pages, K, 2, S, H), jnp.int8),
            pltpu.VMEM((2, pages, K, self.lanes), jnp.float32),
        ], []

    def open(self, buffers: Sequence[Any], workspace: Sequence[Any]) -> Callable:
        """Keys and values of a head as they are stored, and their scales.

        Scales multiply logits and weights, since an int8 is exact in any float type.
        """
        pages_ref, scale_ref = buffers
        pages, S = pages_ref.shape[0], self.page_size

        def read(head: int):
            k_CH, v_CH = (pages_ref[:, head, i].reshape(-1, self.head_dim) for i in range(2))
            scales = (
                jnp.concatenate(
                    [scale_ref[page, head : head + 1, first : first + S] for page in range(pages)],
                    axis=1,
                )
                for first in (0, self.lanes // 2)
            )
            return k_CH, v_CH, *scales

        return read
