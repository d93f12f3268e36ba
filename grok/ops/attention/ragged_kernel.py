"""Attention over pages with a sliding window and a temperature of each query, or over int8 pages: a
TPU kernel.

The pages that a block of queries sees are copied from HBM in their order, a block of pages while
the one before it is multiplied, and the first of the next queries with the last of these. Pages
behind the window are not touched. The softmax's maximum and sum go along with the sum of values
(Milakov & Gimelshein 2018).

Letters: U sequences of Q new tokens, P pages of S tokens, M pages of the longest sequence, K kv
heads, G queries a kv head, N = K*G heads, H head_dim; of a block of the kernel: B tokens, R = B*G
queries of a kv head, C keys.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from grok.hardware import LANES, has_small_vmem
from grok.ops.attention.causal import MASKED_LOGIT, causal_mask, temperature
from grok.ops.attention.page_reader import PageReader, page_reader
from grok.ops.pallas import pl, pltpu
from grok.ops.softcap import apply_softcap

MAX_BLOCK_QUERIES, MAX_BLOCK_KEYS = 512, 512  # of one kv head
MAX_BLOCK_ROWS = 8192  # keys and values of all kv heads, which take 4 MiB in float32
SMALL_BLOCK_QUERIES = 2048  # of all kv heads, where vector memory is small
TOKEN_MULTIPLE = 16  # of the queries' blocks, so that these are whole tiles of any float type
VMEM_LIMIT_BYTES = 64 * 2**20


def ragged_kernel(
    q_UQNH,
    pages: tuple[jax.Array, ...],
    table_UM,
    start_U,
    *,
    page_size: int,
    scale: float,
    softcap: float | None,
    window: int | None = None,
    temperature_length: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Attention of each token over its sequence up to itself, o_UQNH.

    Token q of sequence u is at position start_U[u] + q. `pages` are an array of float pages, or of
    int8 pages and of their scales, as of `grok.ops.attention.page_reader`.
    """
    U, Q, N, H = q_UQNH.shape
    reader = page_reader(pages, page_size)
    K = reader.num_kv_heads
    terms = scale, softcap, window, temperature_length
    b = _Blocks.of(Q, N // K, K, H, page_size, table_UM.shape[1], *terms)
    q_UQNH = jnp.pad(q_UQNH, ((0, 0), (0, -Q % b.B), (0, 0), (0, 0)))
    q_UKRH = jnp.moveaxis(q_UQNH.reshape(U, -1, K, b.G, H), 2, 1).reshape(U, K, -1, H)
    q_spec = pl.BlockSpec((None, K, b.R, H), lambda u, i, *_: (u, 0, i, 0))
    steps = q_UKRH.shape[2] // b.R
    buffers, workspace = reader.scratch(b.pages)
    o_UKRH = pl.pallas_call(
        functools.partial(_kernel, b, reader),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(U, steps),
            in_specs=[q_spec, *[pl.BlockSpec(memory_space=pl.ANY)] * len(pages)],
            out_specs=q_spec,
            scratch_shapes=[buffers, workspace, *b.scratch(len(pages))],
        ),
        out_shape=jax.ShapeDtypeStruct(q_UKRH.shape, q_UKRH.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT_BYTES
        ),
        cost_estimate=b.cost(U, steps, q_UQNH.dtype.itemsize, reader.bytes_per_token),
        interpret=interpret,
        name=reader.kernel_name,
    )(table_UM, start_U, q_UKRH, *pages)
    return jnp.moveaxis(o_UKRH.reshape(U, K, -1, b.G, H), 1, 2).reshape(U, -1, N, H)[:, :Q]


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Sizes of the arrays and of the kernel's blocks, and static terms of the logits."""

    Q: int
    G: int
    K: int
    H: int
    S: int
    M: int
    B: int
    pages: int  # of a block of keys
    scale: float
    softcap: float | None
    window: int | None
    temperature_length: int | None

    @classmethod
    def of(cls, Q: int, G: int, K: int, H: int, S: int, M: int, *terms) -> "_Blocks":
        """Blocks as large as vector memory allows."""
        queries, rows = MAX_BLOCK_QUERIES, MAX_BLOCK_ROWS
        if has_small_vmem():
            queries, rows = min(queries, SMALL_BLOCK_QUERIES // K), rows // 2
        tokens = queries // G // TOKEN_MULTIPLE * TOKEN_MULTIPLE
        B = Q if queries >= Q * G else max(TOKEN_MULTIPLE, tokens)
        keys = min(MAX_BLOCK_KEYS, rows // (2 * K))
        return cls(Q, G, K, H, S, M, B, min(M, max(1, keys // S)), *terms)

    @property
    def R(self) -> int:
        """Queries of a block, of one kv head."""
        return self.B * self.G

    @property
    def C(self) -> int:
        """Keys of a block, of one kv head."""
        return self.pages * self.S

    def scratch(self, num_arrays: int) -> list[Any]:
        """Semaphores of two blocks of pages, the one that is next, and of each kv head the
        softmax's maximum and sum and the sum of values."""
        return [
            pltpu.SemaphoreType.DMA((2, num_arrays)),
            pltpu.SMEM((1,), jnp.int32),
            pltpu.VMEM((self.K, self.R, LANES), jnp.float32),
            pltpu.VMEM((self.K, self.R, LANES), jnp.float32),
            pltpu.VMEM((self.K, self.R, self.H), jnp.float32),
        ]

    def cost(self, U: int, steps: int, q_bytes: int, bytes_per_token: int) -> "pl.CostEstimate":
        """Cost with full caches: a token sees them all, tokens of a prompt half of them on average,
        and no more than a window."""
        keys = self.M * self.S if self.Q == 1 else self.M * self.S // 2
        keys = keys if self.window is None else min(keys, self.window + self.B)
        pairs = U * steps * self.R * self.K * keys
        return pl.CostEstimate(
            flops=4 * pairs * self.H,
            bytes_accessed=U
            * steps
            * (2 * self.R * self.K * self.H * q_bytes + keys * bytes_per_token),
            transcendentals=2 * pairs,
        )

    def span(self, start_U, u, i) -> tuple[Any, ...]:
        """First token and last key of a block of queries, and the pages that it sees, from and
        to."""
        first = start_U[u] + i * self.B
        end = jnp.minimum(first + self.B, start_U[u] + self.Q)
        last = jnp.minimum(end, self.M * self.S) - 1
        earliest = 0 if self.window is None else jnp.maximum(first - self.window + 1, 0)
        return first, last, jnp.minimum(earliest // self.S, self.M - 1), last // self.S + 1


def _kernel(b: _Blocks, reader: PageReader, table, start, q_ref, *refs):
    """One block of queries over all blocks of pages that it sees."""
    pages, (o_ref, buffers, workspace, semaphores, slot_ref, *sums) = refs[:-8], refs[-8:]
    (u, i), (num_u, num_i) = _over_grid(pl.program_id), _over_grid(pl.num_programs)
    max_ref, sum_ref, o_sum_ref = sums
    first, last, begin, end = b.span(start, u, i)

    def copy_pages(u, i, block, slot, act) -> None:
        """Starts, or awaits, the copies of a block of pages."""
        _, _, begin, end = b.span(start, u, i)
        page = begin + block * b.pages

        def copy_page(j, _):
            for n, (array, buffer) in enumerate(zip(pages, buffers, strict=True)):
                target = buffer.at[slot, j]
                source, semaphore = array.at[table[u, page + j]], semaphores.at[slot, n]
                act(pltpu.make_async_copy(source, target, semaphore))
            return 0

        jax.lax.fori_loop(0, jnp.minimum(end - page, b.pages), copy_page, 0)

    start_copies = functools.partial(copy_pages, act=lambda copy: copy.start())
    await_copies = functools.partial(copy_pages, act=lambda copy: copy.wait())
    num_blocks = pl.cdiv(end - begin, b.pages)
    next_i = jnp.where(i + 1 == num_i, 0, i + 1)
    next_u = jnp.where(i + 1 == num_i, u + 1, u)

    @pl.when((u == 0) & (i == 0))
    def _():
        slot_ref[0] = 0
        start_copies(0, 0, 0, 0)

    def attend_block(block, slot):
        is_last = block + 1 == num_blocks

        @pl.when(~is_last)
        def _():
            start_copies(u, i, block + 1, 1 - slot)

        @pl.when(is_last & (next_u < num_u))
        def _():
            start_copies(next_u, next_i, 0, 1 - slot)

        await_copies(u, i, block, slot)
        key = (begin + block * b.pages) * b.S
        read = reader.open([buffer.at[slot] for buffer in buffers], workspace)
        _attend(b, first, last, key, q_ref, read, *sums)
        return 1 - slot

    max_ref[...] = jnp.full_like(max_ref, MASKED_LOGIT)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    o_sum_ref[...] = jnp.zeros_like(o_sum_ref)
    slot_ref[0] = jax.lax.fori_loop(0, num_blocks, attend_block, slot_ref[0])
    o_ref[...] = (o_sum_ref[...] / sum_ref[:, :, :1]).astype(o_ref.dtype)


def _attend(b: _Blocks, first, last, key, q_ref, read, max_ref, sum_ref, o_sum_ref):
    """One block of keys, of which the first is at position `key` and `read` reads those of a head,
    for queries from position `first` on, of which none sees a key behind `last`."""
    query_R1 = first + jax.lax.broadcasted_iota(jnp.int32, (b.R, 1), 0) // b.G
    key_1C, key_C1 = (
        key + jax.lax.broadcasted_iota(jnp.int32, shape, dim)
        for dim, shape in ((1, (1, b.C)), (0, (b.C, 1)))
    )
    seen_RC = causal_mask(key_1C, query_R1, b.window)
    # What no query sees may not be finite, and 0 times that is NaN.
    seen_1C, seen_C1 = (causal_mask(key, last, None) for key in (key_1C, key_C1))
    if b.window is not None:
        seen_1C &= key_1C > first - b.window
        seen_C1 &= key_C1 > first - b.window
    for head in range(b.K):
        k_CH, v_CH, k_scale_1C, v_scale_1C = read(head)
        logits_RC = _dot(q_ref[head], k_CH.astype(q_ref.dtype), 1) * b.scale
        if k_scale_1C is not None:
            logits_RC *= k_scale_1C
        logits_RC = apply_softcap(logits_RC, b.softcap)
        if b.temperature_length is not None:
            logits_RC *= temperature(query_R1, b.temperature_length)
        logits_RC = jnp.where(seen_RC, logits_RC, MASKED_LOGIT)
        before_R1 = max_ref[head, :, :1]
        largest_R1 = jnp.maximum(before_R1, jnp.max(logits_RC, axis=1, keepdims=True))
        # A query that has seen nothing yet has weights of 1 here; its first key makes them 0.
        weights_RC = jnp.exp(logits_RC - largest_R1)
        shrink_R1 = jnp.exp(before_R1 - largest_R1)
        sum_R1 = sum_ref[head, :, :1] * shrink_R1 + jnp.sum(weights_RC, axis=1, keepdims=True)
        if v_scale_1C is None:
            v_CH = jnp.where(seen_C1, v_CH, 0)
        else:
            weights_RC *= jnp.where(seen_1C, v_scale_1C, 0)
        values_RH = _dot(weights_RC.astype(q_ref.dtype), v_CH.astype(q_ref.dtype), 0)
        o_sum_ref[head] = o_sum_ref[head] * shrink_R1 + values_RH
        max_ref[head] = jnp.broadcast_to(largest_R1, max_ref.shape[1:])
        sum_ref[head] = jnp.broadcast_to(sum_R1, sum_ref.shape[1:])


def _dot(x, y, y_dim: int) -> jax.Array:
    """Product that contracts the columns of x and dimension `y_dim` of y, summed in float32."""
    dims = (((1,), (y_dim,)), ((), ()))
    return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)


def _over_grid(of_dimension) -> tuple[Any, Any]:
    return of_dimension(0), of_dimension(1)
