"""Attention's keys and values: the rows themselves in training, pages of a cache in inference.

`PackedRows` and `PagedAttend` are the only difference between training, prefill and decode: a block
gets one of them, and its attention calls it with queries, keys and values.

A page of the cache holds S tokens of one sequence; a sequence's pages lie anywhere, in the order
that its table says. Each group of devices that sees other tokens has pages of its own.

Letters: B batch (of a cache: groups of devices), T length, N heads, K kv heads, H head_dim, U
blocks of a step (Q tokens in a row of one sequence each), L layers, P pages, S tokens of a page, M
pages of the longest sequence.
"""

import dataclasses
import functools
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from grok import hardware, sharding
from grok.config import AttentionConfig, ModelConfig
from grok.config.section import round_up
from grok.errors import ConfigError
from grok.hardware import LANES
from grok.ops.attention import ragged
from grok.ops.attention.causal import attention
from grok.ops.attention.flash import flash_attention, supports
from grok.ops.attention.int8_pages import scale_lanes
from grok.ops.attention.paged import paged_attention, write_pages
from grok.ops.cpu import few_rows
from grok.sharding import Axes


class Attend(Protocol):
    """Keys and values that the tokens of a block attend to, and the tokens' positions."""

    is_serving: ClassVar[bool]  # nothing is differentiated

    @property
    def positions_BT(self) -> jax.Array:
        """Rotary position of every token."""

    def stream_axes(self, length: int) -> Axes:
        """Logical axes of the residual stream of `length` tokens a row."""

    def __call__(
        self, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, config: AttentionConfig
    ) -> tuple[jax.Array, Any]:
        """Returns o_BTNH, and what the tokens of the next layer see."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class PackedRows:
    """Rows over themselves: a token sees the earlier tokens of its segment; segment 0 is
    padding."""

    segment_ids_BT: jax.Array
    positions_BT: jax.Array
    is_serving: ClassVar[bool] = False

    def stream_axes(self, length: int) -> Axes:
        """Between blocks the devices that share heads each keep some of the tokens."""
        return sharding.sequence_parallel_axes(length)

    def __call__(self, q_BTNH, k_BTKH, v_BTKH, config: AttentionConfig):
        """Returns o_BTNH and these rows, which nothing changes."""
        kv = sharding.kv_axis(config.num_kv_heads)
        flash = hardware.platform() == "tpu" and supports(q_BTNH.shape[1])
        terms = _terms(config)
        # An operand that nothing reads would change the program.
        positions_BT = None if config.temperature_length is None else self.positions_BT

        def local(q, k, v, segment, positions):
            k, v = _kv_of_local_heads(q, k, v, config)
            if flash:
                return flash_attention(q, k, v, segment, positions_BT=positions, **terms)
            index = jnp.broadcast_to(jnp.arange(q.shape[1])[None, :], segment.shape)
            return attention(q, k, v, index, segment, segment, positions, **terms)

        q_axes, kv_axes = ("batch", "length", "heads", None), ("batch", None, kv, None)
        rows = ("batch", None)
        in_axes = (q_axes, kv_axes, kv_axes, rows, () if positions_BT is None else rows)
        kernel = sharding.shard_map(local, in_axes, q_axes, check_vma=not flash)
        o_BTNH = kernel(q_BTNH, k_BTKH, v_BTKH, self.segment_ids_BT, positions_BT)
        # The kernel names what its backward pass reads; a second name would save that twice.
        return o_BTNH if flash else checkpoint_name(o_BTNH, "attention"), self


def _terms(config: AttentionConfig) -> dict[str, Any]:
    """Keywords of `grok.ops.attention` for the terms of the logits that the model has."""
    optional = {"window": config.window, "temperature_length": config.temperature_length}
    present = {name: value for name, value in optional.items() if value is not None}
    return {"scale": config.logit_scale, "softcap": config.logit_softcap, **present}


def _kv_of_local_heads(q_BTNH, k_BSKH, v_BSKH, config: AttentionConfig):
    """Keys and values of the query heads that this device has."""
    group, heads = config.num_heads // config.num_kv_heads, q_BTNH.shape[2]
    if heads == k_BSKH.shape[2] * group:
        return k_BSKH, v_BSKH
    # This device has all kv heads and fewer query heads than share one of them.
    first = sharding.axis_index("heads") * heads // group
    return (jax.lax.dynamic_slice_in_dim(a, first, 1, axis=2) for a in (k_BSKH, v_BSKH))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class PagedCache:
    """Keys (2: first) and values of all layers; donated from step to step.

    `kv` is (L, P, S, K, 2, H). int8 values are (L, P, K, 2, S, H) and have scales, as
    `grok.ops.attention.int8_pages` says.
    """

    kv: jax.Array
    scale_LPKT: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class PagedBatch:
    """Positions of a step's tokens, int32: block u of group b holds `count_BU` tokens, from
    position `start_BU` of the sequence with the pages `table_BUM`.

    The rest of a block is padding. Pages count within a group. Those that no token sees, behind
    the end of a sequence or behind its window, may be any.
    """

    table_BUM: Any  # jax.Array or np.ndarray
    start_BU: Any
    count_BU: Any

    def token_mask(self, length: int) -> jax.Array:
        """True for those of the T = U * Q tokens that are no padding, (B, T)."""
        return (jnp.arange(length)[None, None, :] < self.count_BU[:, :, None]).reshape(
            self.count_BU.shape[0], -1
        )

    def positions(self, length: int) -> jax.Array:
        """Position of every token in its sequence, (B, T)."""
        positions = self.start_BU[:, :, None] + jnp.arange(length, dtype=jnp.int32)[None, None, :]
        return positions.reshape(self.start_BU.shape[0], -1)


@dataclasses.dataclass
class PagedAttend:
    """The cache and the new tokens, of which a layer's keys and values are written to the cache.

    Each row holds U blocks of `block_length` (Q) tokens, as `batch` says.
    """

    cache: PagedCache
    batch: PagedBatch
    layer: jax.Array
    block_length: int
    is_serving: ClassVar[bool] = True

    @property
    def positions_BT(self) -> jax.Array:
        """Position of every token in its sequence."""
        return self.batch.positions(self.block_length)

    def stream_axes(self, length: int) -> Axes:
        """Every device of a group has all tokens: there are few."""
        return "batch", "length", None

    def __call__(self, q_BTNH, k_BTKH, v_BTKH, config: AttentionConfig):
        """Returns o_BTNH, and the cache with the new tokens in it."""
        cache, batch, Q = self.cache, self.batch, self.block_length
        kv, group = sharding.kv_axis(config.num_kv_heads), config.num_heads // config.num_kv_heads
        # With all kv heads and fewer query heads than share one, it is the same for all.
        fewer = config.num_heads // sharding.axis_size("heads") < group
        kernel = hardware.platform() == "tpu" and not fewer
        kernel = kernel and ragged.supports(cache.kv, config.head_dim)

        def local(q, k, v, kv_pages, scales, table_BUM, start_BU, count_BU, layer):
            # Each device has the tokens of one group.
            new = jnp.stack([k, v], axis=3).reshape(-1, Q, *k.shape[2:3], 2, k.shape[3])
            where = layer, table_BUM[0], start_BU[0]
            shared = sharding.axis_index("heads") * q.shape[2] // group if fewer else None
            kv_pages, scales = write_pages(kv_pages, scales, layer, new, *where[1:], count_BU[0])
            q_UQNH, terms = q.reshape(-1, Q, *q.shape[2:]), _terms(config)
            if kernel:
                o_UQNH = ragged.ragged_attention(q_UQNH, kv_pages, scales, *where, **terms)
            elif few_rows.supports_attention(Q, q, kv_pages, scales) and not fewer:
                o_UQNH = few_rows.attention(q_UQNH, kv_pages, *where, count_U=count_BU[0], **terms)
            else:
                portable = functools.partial(paged_attention, count_U=count_BU[0], kv_head=shared)
                o_UQNH = portable(q_UQNH, kv_pages, scales, *where, **terms)
            return o_UQNH.reshape(q.shape), kv_pages, scales

        q_axes, kv_axes = ("batch", "length", "heads", None), ("batch", None, kv, None)
        cache_axes, scale_axes = _cache_axes(config, cache.scale_LPKT is not None)
        rows = ("batch", None)
        in_axes = (q_axes, kv_axes, kv_axes, cache_axes, scale_axes, (*rows, None), rows, rows, ())
        sharded = sharding.shard_map(
            local, in_axes, (q_axes, cache_axes, scale_axes), check_vma=not kernel
        )
        tokens = q_BTNH, k_BTKH, v_BTKH
        pages = cache.kv, cache.scale_LPKT
        places = batch.table_BUM, batch.start_BU, batch.count_BU
        o_BTNH, *pages = sharded(*tokens, *pages, *places, self.layer)
        return o_BTNH, dataclasses.replace(self, cache=PagedCache(*pages))


def _check_int8_kernel(page_size: int, head_dim: int) -> None:
    if page_size % ragged.INT8_SUBLANES:
        problem = f"engine.page_size={page_size} leaves tiles of an int8 cache half empty on a TPU"
        near = round_up(page_size, ragged.INT8_SUBLANES)
        raise ConfigError(f"{problem}; engine.page_size={near} would work.")
    if head_dim % LANES:
        problem = f"the kernel for an int8 cache on a TPU needs heads of {LANES} values, not"
        raise ConfigError(f"{problem} {head_dim}; engine.cache_dtype=compute would work.")


def init_cache(config: ModelConfig, pages: int, page_size: int, dtype: str) -> PagedCache:
    """Empty pages, `pages` over all groups, with values in `dtype`: a float type or int8.

    Raises ConfigError for int8 pages that the kernel for TPUs would not take.
    """
    if dtype == "int8" and hardware.platform() == "tpu":
        _check_int8_kernel(page_size, config.attention.head_dim)
    L, K, H = config.num_layers, config.attention.num_kv_heads, config.attention.head_dim
    is_int8 = dtype == "int8"
    kv_axes, scale_axes = _cache_axes(config.attention, is_int8)
    page = (K, 2, page_size, H) if is_int8 else (page_size, K, 2, H)
    kv = sharding.constrain(jnp.zeros((L, pages, *page), dtype), *kv_axes)
    if not is_int8:
        return PagedCache(kv)
    scale_LPKT = jnp.zeros((L, pages, K, scale_lanes(page_size)), jnp.float32)
    return PagedCache(kv, sharding.constrain(scale_LPKT, *scale_axes))


def _cache_axes(config: AttentionConfig, is_int8: bool) -> tuple[Axes, Axes]:
    """Axes of the cache's values, and of their scales."""
    kv = sharding.kv_axis(config.num_kv_heads)
    if is_int8:
        return ("layers", "batch", kv, None, None, None), ("layers", "batch", kv, None)
    return ("layers", "batch", None, kv, None, None), ()
