"""Flash attention (Dao et al. 2022) whose capped logits a temperature of each query multiplies: TPU
kernels of the forward pass and of both sides of the backward pass.

A block of logits has its keys in rows and its queries in columns, those of all G heads that share
the keys side by side. So keys are read once for G heads, what belongs to a query lies along lanes,
and the softmax sums over rows. The grid visits the pairs of blocks in which anything is seen.

Letters: B batch, T length, K kv heads, G queries a kv head, H head_dim, Q queries of a block and C
keys of a block, R = G*Q, I pairs of blocks.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from grok.hardware import LANES
from grok.ops.attention.causal import MASKED_LOGIT

MAX_BLOCK_ROWS = 1024  # queries of all heads that share keys
MAX_BLOCK_LOGITS = 512 * 1024  # an array of them in float32 takes 2 MiB of vector memory
# Vector memory to ask for: what every generation has, and more for more than 32 heads a kv head.
MIN_VMEM_LIMIT_BYTES, VMEM_BYTES_PER_ROW = 16 * 2**20, 4 * 2**10

Pairs = tuple[np.ndarray, np.ndarray]  # query and key block of each step, int32


class Terms(NamedTuple):
    """Static terms of the logits, and how the kernels run."""

    scale: float
    softcap: float | None
    window: int | None
    interpret: Any = False


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def flash_with_temperature(
    q_BKGTH, k_BKTH, v_BKTH, temperature_BT, segment_BT, terms: Terms
) -> jax.Array:
    """Attention of queries and keys of the same tokens, o_BKGTH.

    Whole blocks of lanes must make up T and H. For the backward pass the result and the logarithm
    of the softmax's sum are kept, both named "attention" for a remat policy.
    """
    return _forward(q_BKGTH, k_BKTH, v_BKTH, temperature_BT, segment_BT, terms)[0]


def _forward(q, k, v, temperature_BT, segment_BT, terms):
    """The result and what the backward pass needs."""
    blocks = _Blocks.of(q, terms)
    rows = temperature_BT[:, None], segment_BT[:, None], segment_BT[:, None]
    o, log_sum_BKGT = blocks.call(
        _forward_kernel,
        blocks.pairs(),
        matmuls=2,
        operands=(q, k, v, *rows),
        results=(q, jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)),
        sides=("heads", "heads_stat"),
        scratch=[(1, blocks.R), (1, blocks.R), (blocks.H, blocks.R)],
    )
    o, log_sum_BKGT = (checkpoint_name(x, "attention") for x in (o, log_sum_BKGT))
    return o, (q, k, v, temperature_BT, segment_BT, o, log_sum_BKGT)


def _backward(terms, residuals, do):
    """Gradients of queries, keys and values."""
    q, k, v, temperature_BT, segment_BT, o, log_sum_BKGT = residuals
    blocks = _Blocks.of(q, terms)
    rows = temperature_BT[:, None], segment_BT[:, None], segment_BT[:, None]
    mean_BKGT = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1)
    call = functools.partial(blocks.call, operands=(q, k, v, *rows, do, log_sum_BKGT, mean_BKGT))
    by_query, by_key = blocks.pairs(), blocks.pairs(by_key=True)
    heads, keys = [(blocks.H, blocks.R)], [(blocks.C, blocks.H)]
    (dq,) = call(_dq_kernel, by_query, matmuls=3, results=(q,), sides=("heads",), scratch=heads)
    dk, dv = call(
        _dkv_kernel, by_key, matmuls=4, results=(k, v), sides=("keys", "keys"), scratch=keys * 2
    )
    return dq, dk, dv, None, None


flash_with_temperature.defvjp(_forward, _backward)


class _Blocks(NamedTuple):
    """Sizes of the arrays and of the blocks."""

    B: int
    K: int
    G: int
    T: int
    H: int
    Q: int
    C: int
    terms: Terms

    @classmethod
    def of(cls, q_BKGTH: jax.Array, terms: Terms) -> "_Blocks":
        """Blocks as large as vector memory allows, and that T is a multiple of."""
        B, K, G, T, H = q_BKGTH.shape
        sizes = [size for size in (1024, 512, 256, LANES) if T % size == 0]
        Q = next((size for size in sizes if G * size <= MAX_BLOCK_ROWS), LANES)
        C = next((size for size in sizes if size * G * Q <= MAX_BLOCK_LOGITS), LANES)
        return cls(B, K, G, T, H, Q, C, terms)

    @property
    def R(self) -> int:
        """Queries of a block, of all heads that share keys."""
        return self.G * self.Q

    def pairs(self, by_key: bool = False) -> Pairs:
        """Pairs of blocks with a query that sees a key, in order of the query blocks, or of the key
        blocks."""
        window = self.T if self.terms.window is None else self.terms.window
        first_query, last_query = (np.arange(self.T // self.Q) + n for n in (0, 1))
        key = np.arange(self.T // self.C)
        earliest = (first_query * self.Q - window + 1)[:, None]
        seen = (key * self.C < (last_query * self.Q)[:, None]) & ((key + 1) * self.C > earliest)
        query, key = np.nonzero(seen)
        order = np.lexsort((query, key)) if by_key else slice(None)
        return query[order].astype(np.int32), key[order].astype(np.int32)

    def specs(self) -> dict[str, pl.BlockSpec]:
        """Blocks of the arrays of each side: by heads, or the same for all heads."""
        G, Q, C, H = self.G, self.Q, self.C, self.H
        return {
            "heads": pl.BlockSpec((None, None, G, Q, H), lambda b, k, i, q, c: (b, k, 0, q[i], 0)),
            "heads_stat": pl.BlockSpec((None, None, G, Q), lambda b, k, i, q, c: (b, k, 0, q[i])),
            "keys": pl.BlockSpec((None, None, C, H), lambda b, k, i, q, c: (b, k, c[i], 0)),
            "query_row": pl.BlockSpec((None, 1, Q), lambda b, k, i, q, c: (b, 0, q[i])),
            "key_row": pl.BlockSpec((None, 1, C), lambda b, k, i, q, c: (b, 0, c[i])),
        }

    def call(self, kernel, pairs: Pairs, *, matmuls: int, operands, results, sides, scratch):
        """Runs `kernel` on every pair of blocks of every row and kv head."""
        specs = self.specs()
        inputs = ["heads", "keys", "keys", "query_row", "query_row", "key_row"]
        inputs += ["heads", "heads_stat", "heads_stat"][: len(operands) - len(inputs)]
        steps = self.B * self.K * len(pairs[0])
        streamed = 2 * steps * operands[1].dtype.itemsize * self.H
        streamed *= self.R if sides[0] == "keys" else self.C
        arrays = [*operands, *results]
        return pl.pallas_call(
            functools.partial(kernel, self),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(self.B, self.K, len(pairs[0])),
                in_specs=[specs[name] for name in inputs],
                out_specs=[specs[name] for name in sides],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=max(MIN_VMEM_LIMIT_BYTES, VMEM_BYTES_PER_ROW * self.R),
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * matmuls * steps * self.R * self.C * self.H,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays) + streamed,
                transcendentals=2 * steps * self.R * self.C,
            ),
            interpret=self.terms.interpret,
            name=kernel.__name__.strip("_").replace("_kernel", "_flash_attention"),
        )(*pairs, *operands)

    def rows(self, ref) -> jax.Array:
        """A block of one number a query, or a query and head, along lanes, (1, R)."""
        parts = (
            [ref[...]] * self.G if ref.shape[0] == 1 else [ref[g : g + 1] for g in range(self.G)]
        )
        return jnp.concatenate(parts, axis=1)


def _forward_kernel(b: _Blocks, query, key, *refs):
    """One pair of blocks of the forward pass: the softmax's maximum and sum so far, and the values'
    sum with the weights so far."""
    v_ref, (o_ref, log_sum_ref, max_ref, sum_ref, o_sum_ref) = refs[2], refs[6:]

    @pl.when(_begins(query))
    def _():
        max_ref[...] = jnp.full_like(max_ref, MASKED_LOGIT)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        o_sum_ref[...] = jnp.zeros_like(o_sum_ref)

    logits_CR, _ = _logits(b, query, key, *refs[:2], *refs[3:6])
    largest_1R = jnp.maximum(max_ref[...], jnp.max(logits_CR, axis=0, keepdims=True))
    # A query that has seen nothing yet has weights of 1 here; its first key makes them 0.
    weights_CR = jnp.exp(logits_CR - largest_1R)
    shrink_1R = jnp.exp(max_ref[...] - largest_1R)
    v_CH = v_ref[...]
    sum_ref[...] = sum_ref[...] * shrink_1R + jnp.sum(weights_CR, axis=0, keepdims=True)
    o_sum_ref[...] = o_sum_ref[...] * shrink_1R + _dot(v_CH, weights_CR.astype(v_CH.dtype), 0, 0)
    max_ref[...] = largest_1R

    @pl.when(_ends(query))
    def _():
        o_HR = o_sum_ref[...] / sum_ref[...]
        o_ref[...] = o_HR.T.reshape(o_ref.shape).astype(o_ref.dtype)
        log_sum_1R = max_ref[...] + jnp.log(sum_ref[...])
        for g in range(b.G):
            log_sum_ref[g : g + 1] = log_sum_1R[:, g * b.Q : (g + 1) * b.Q]


def _dq_kernel(b: _Blocks, query, key, *refs):
    """One pair of blocks of the gradient of the queries."""
    k_ref, temperature_ref, (dq_ref, dq_sum_ref) = refs[1], refs[3], refs[9:]

    @pl.when(_begins(query))
    def _():
        dq_sum_ref[...] = jnp.zeros_like(dq_sum_ref)

    _, dlogits_CR = _weights_and_gradient(b, query, key, refs)
    k_CH = k_ref[...]
    dq_sum_ref[...] += _dot(k_CH, dlogits_CR.astype(k_CH.dtype), 0, 0)

    @pl.when(_ends(query))
    def _():
        dq_HR = dq_sum_ref[...] * (b.terms.scale * b.rows(temperature_ref))
        dq_ref[...] = dq_HR.T.reshape(dq_ref.shape).astype(dq_ref.dtype)


def _dkv_kernel(b: _Blocks, query, key, *refs):
    """One pair of blocks of the gradients of keys and values."""
    q_ref, temperature_ref, do_ref = refs[0], refs[3], refs[6]
    dk_ref, dv_ref, dk_sum_ref, dv_sum_ref = refs[9:]

    @pl.when(_begins(key))
    def _():
        dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
        dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    weights_CR, dlogits_CR = _weights_and_gradient(b, query, key, refs)
    dlogits_CR *= b.rows(temperature_ref)
    q_RH, do_RH = (ref[...].reshape(b.R, b.H) for ref in (q_ref, do_ref))
    dk_sum_ref[...] += _dot(dlogits_CR.astype(q_RH.dtype), q_RH, 1, 0)
    dv_sum_ref[...] += _dot(weights_CR.astype(do_RH.dtype), do_RH, 1, 0)

    @pl.when(_ends(key))
    def _():
        dk_ref[...] = (dk_sum_ref[...] * b.terms.scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum_ref[...].astype(dv_ref.dtype)


def _logits(b: _Blocks, query, key, q_ref, k_ref, temperature_ref, q_segment_ref, k_segment_ref):
    """Masked logits of a pair of blocks, (C, R), and their derivative by q k, but for scale and
    temperature."""
    scale, softcap, window, _ = b.terms
    temperature_1R = b.rows(temperature_ref)
    qk_CR = _dot(k_ref[...], q_ref[...].reshape(b.R, b.H), 1, 1)
    if softcap is None:
        logits_CR, slope_CR = qk_CR * (scale * temperature_1R), None
    else:
        tanh_CR = jnp.tanh(qk_CR * (scale / softcap))
        logits_CR, slope_CR = tanh_CR * (softcap * temperature_1R), 1 - tanh_CR * tanh_CR
    i = pl.program_id(2)
    query_1Q = query[i] * b.Q + jax.lax.broadcasted_iota(jnp.int32, (1, b.Q), 1)
    query_1R = jnp.concatenate([query_1Q] * b.G, axis=1)
    key_C1 = key[i] * b.C + jax.lax.broadcasted_iota(jnp.int32, (b.C, 1), 0)
    k_segment_C1 = k_segment_ref[...].reshape(b.C, 1)
    seen_CR = (key_C1 <= query_1R) & (k_segment_C1 == b.rows(q_segment_ref))
    if window is not None:
        seen_CR &= key_C1 > query_1R - window
    return jnp.where(seen_CR, logits_CR, MASKED_LOGIT), slope_CR


def _weights_and_gradient(b: _Blocks, query, key, refs):
    """Softmax weights of a pair of blocks, and the gradient of q k but for scale and temperature,
    both (C, R)."""
    v_ref, do_ref, log_sum_ref, mean_ref = refs[2], refs[6], refs[7], refs[8]
    logits_CR, slope_CR = _logits(b, query, key, *refs[:2], *refs[3:6])
    weights_CR = jnp.exp(logits_CR - b.rows(log_sum_ref))
    dweights_CR = _dot(v_ref[...], do_ref[...].reshape(b.R, b.H), 1, 1)
    dlogits_CR = weights_CR * (dweights_CR - b.rows(mean_ref))
    return weights_CR, dlogits_CR if slope_CR is None else dlogits_CR * slope_CR


def _dot(x, y, x_dim: int, y_dim: int) -> jax.Array:
    """Product that contracts dimension `x_dim` of x and `y_dim` of y, summed in float32."""
    dims = (((x_dim,), (y_dim,)), ((), ()))
    return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)


def _begins(block) -> jax.Array:
    """True at the first of the steps of a block."""
    i = pl.program_id(2)
    return (i == 0) | (block[jnp.maximum(i - 1, 0)] != block[i])


def _ends(block) -> jax.Array:
    """True at the last of the steps of a block."""
    i, last = pl.program_id(2), pl.num_programs(2) - 1
    return (i == last) | (block[jnp.minimum(i + 1, last)] != block[i])
