"""Flash attention (Dao et al. 2022) whose capped logits a temperature of each query multiplies: TPU
kernels of the forward pass and of both sides of the backward pass.

A block of logits has its keys in rows and its queries in columns, those of all G heads that share
the keys side by side. So keys are read once for G heads, what belongs to a query lies along lanes,
and the softmax sums over rows. The grid visits the pairs of blocks in which anything is seen.

Letters as in `grok.ops.attention.flash_blocks`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from grok.ops.attention.causal import MASKED_LOGIT
from grok.ops.attention.flash_blocks import Blocks, Terms, begins, ends, key_of, query_of
from grok.ops.pallas import pl


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
    blocks = Blocks.of(q, terms)
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
    blocks = Blocks.of(q, terms)
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


def _forward_kernel(b: Blocks, pairs, *refs):
    """One pair of blocks of the forward pass: the softmax's maximum and sum so far, and the values'
    sum with the weights so far."""
    v_ref, (o_ref, log_sum_ref, max_ref, sum_ref, o_sum_ref) = refs[2], refs[6:]

    @pl.when(begins(pairs, query_of))
    def _():
        max_ref[...] = jnp.full_like(max_ref, MASKED_LOGIT)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        o_sum_ref[...] = jnp.zeros_like(o_sum_ref)

    logits_CR, _ = _logits(b, pairs, *refs[:2], *refs[3:6])
    largest_1R = jnp.maximum(max_ref[...], jnp.max(logits_CR, axis=0, keepdims=True))
    # A query that has seen nothing yet has weights of 1 here; its first key makes them 0.
    weights_CR = jnp.exp(logits_CR - largest_1R)
    shrink_1R = jnp.exp(max_ref[...] - largest_1R)
    v_CH = v_ref[...]
    sum_ref[...] = sum_ref[...] * shrink_1R + jnp.sum(weights_CR, axis=0, keepdims=True)
    o_sum_ref[...] = o_sum_ref[...] * shrink_1R + _dot(v_CH, weights_CR.astype(v_CH.dtype), 0, 0)
    max_ref[...] = largest_1R

    @pl.when(ends(pairs, query_of))
    def _():
        o_HR = o_sum_ref[...] / sum_ref[...]
        o_ref[...] = o_HR.T.reshape(o_ref.shape).astype(o_ref.dtype)
        log_sum_1R = max_ref[...] + jnp.log(sum_ref[...])
        for g in range(b.G):
            log_sum_ref[g : g + 1] = log_sum_1R[:, g * b.Q : (g + 1) * b.Q]


def _dq_kernel(b: Blocks, pairs, *refs):
    """One pair of blocks of the gradient of the queries."""
    k_ref, temperature_ref, (dq_ref, dq_sum_ref) = refs[1], refs[3], refs[9:]

    @pl.when(begins(pairs, query_of))
    def _():
        dq_sum_ref[...] = jnp.zeros_like(dq_sum_ref)

    _, dlogits_CR = _weights_and_gradient(b, pairs, refs)
    k_CH = k_ref[...]
    dq_sum_ref[...] += _dot(k_CH, dlogits_CR.astype(k_CH.dtype), 0, 0)

    @pl.when(ends(pairs, query_of))
    def _():
        dq_HR = dq_sum_ref[...] * (b.terms.scale * b.rows(temperature_ref))
        dq_ref[...] = dq_HR.T.reshape(dq_ref.shape).astype(dq_ref.dtype)


def _dkv_kernel(b: Blocks, pairs, *refs):
    """One pair of blocks of the gradients of keys and values."""
    q_ref, temperature_ref, do_ref = refs[0], refs[3], refs[6]
    dk_ref, dv_ref, dk_sum_ref, dv_sum_ref = refs[9:]

    @pl.when(begins(pairs, key_of))
    def _():
        dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
        dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    weights_CR, dlogits_CR = _weights_and_gradient(b, pairs, refs)
    dlogits_CR *= b.rows(temperature_ref)
    q_RH, do_RH = (ref[...].reshape(b.R, b.H) for ref in (q_ref, do_ref))
    dk_sum_ref[...] += _dot(dlogits_CR.astype(q_RH.dtype), q_RH, 1, 0)
    dv_sum_ref[...] += _dot(weights_CR.astype(do_RH.dtype), do_RH, 1, 0)

    @pl.when(ends(pairs, key_of))
    def _():
        dk_ref[...] = (dk_sum_ref[...] * b.terms.scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum_ref[...].astype(dv_ref.dtype)


def _logits(b: Blocks, pairs, q_ref, k_ref, temperature_ref, q_segment_ref, k_segment_ref):
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
    pair = pairs[pl.program_id(2)]
    query_1Q = query_of(pair) * b.Q + jax.lax.broadcasted_iota(jnp.int32, (1, b.Q), 1)
    query_1R = jnp.concatenate([query_1Q] * b.G, axis=1)
    key_C1 = key_of(pair) * b.C + jax.lax.broadcasted_iota(jnp.int32, (b.C, 1), 0)
    k_segment_C1 = k_segment_ref[...].reshape(b.C, 1)
    seen_CR = (key_C1 <= query_1R) & (k_segment_C1 == b.rows(q_segment_ref))
    if window is not None:
        seen_CR &= key_C1 > query_1R - window
    return jnp.where(seen_CR, logits_CR, MASKED_LOGIT), slope_CR


def _weights_and_gradient(b: Blocks, pairs, refs):
    """Softmax weights of a pair of blocks, and the gradient of q k but for scale and temperature,
    both (C, R)."""
    v_ref, do_ref, log_sum_ref, mean_ref = refs[2], refs[6], refs[7], refs[8]
    logits_CR, slope_CR = _logits(b, pairs, *refs[:2], *refs[3:6])
    weights_CR = jnp.exp(logits_CR - b.rows(log_sum_ref))
    dweights_CR = _dot(v_ref[...], do_ref[...].reshape(b.R, b.H), 1, 1)
    dlogits_CR = weights_CR * (dweights_CR - b.rows(mean_ref))
    return weights_CR, dlogits_CR if slope_CR is None else dlogits_CR * slope_CR


def _dot(x, y, x_dim: int, y_dim: int) -> jax.Array:
    """Product that contracts dimension `x_dim` of x and `y_dim` of y, summed in float32."""
    dims = (((x_dim,), (y_dim,)), ((), ()))
    return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)
