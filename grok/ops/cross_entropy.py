"""Cross-entropy of many tokens over a large vocabulary, some tokens at a time.

Letters: R rows (tokens), c rows of a chunk, D embed, V vocab (of which a device may have a part).
"""

import functools

import jax
import jax.numpy as jnp

from grok.ops.softcap import apply_softcap
from grok.ops.varying import pvary

MAX_LOGITS = 2**26  # that exist at a time: 256 MiB of float32


def cross_entropy_reference(x_RD, table_VD, targets_R, scale: float, softcap: float | None = None):
    """Cross-entropy in nats and log-partition of each row, (R,) float32, all logits at once.

    Logits are `scale * x table^T` in float32, under a soft-cap if there is one.
    """
    logits_RV = _logits(x_RD, table_VD, scale, softcap)
    log_z_R = jax.nn.logsumexp(logits_RV, axis=-1)
    target_R = jnp.take_along_axis(logits_RV, targets_R[:, None], axis=-1)[:, 0]
    return log_z_R - target_R, log_z_R


def target_and_log_z(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logit of the target of each row of logits (..., V), and the log-partition, (...) each; their
    difference is the target's log-probability.

    The target's logit is a sum under a mask, so the vocabulary may be split over devices.
    """
    tokens = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    target_logits = jnp.sum(jnp.where(tokens == targets[..., None], logits, 0), axis=-1)
    return target_logits, jax.nn.logsumexp(logits, axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def cross_entropy(
    x_RD,
    table_VD,
    targets_R,
    scale: float,
    softcap: float | None = None,
    axis_names: tuple[str, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """`cross_entropy_reference` in chunks of rows; the backward pass computes logits again.

    Inside `shard_map`, `table_VD` is the device's shard of a vocabulary that is split over the mesh
    axes `axis_names`; results are of the whole one. The gradient of the table is summed in float32,
    whatever its type; that of x is of this shard of the vocabulary alone.
    """
    return _forward(x_RD, table_VD, targets_R, scale, softcap, axis_names)[0]


@jax.named_scope("cross_entropy")
def _forward(x_RD, table_VD, targets_R, scale, softcap, axis_names):
    first = _first_token(table_VD, axis_names)

    def one_chunk(chunk):
        x_cD, targets_c = chunk
        logits_cV = _logits(x_cD, table_VD, scale, softcap)
        largest_c = jax.lax.pmax(jnp.max(logits_cV, axis=-1), axis_names)
        sum_c = jnp.sum(jnp.exp(logits_cV - largest_c[:, None]), axis=-1)
        log_z_c = largest_c + jnp.log(jax.lax.psum(sum_c, axis_names))
        # A sum under a mask, not an index: the target may be in the shard of another device.
        is_target_cV = _one_hot(targets_c - first, logits_cV.shape[1])
        target_c = jnp.sum(jnp.where(is_target_cV, logits_cV, 0), axis=-1)
        target_c = jax.lax.psum(target_c, axis_names)
        return log_z_c - target_c, log_z_c

    entropy_R, log_z_R = (
        _rows(chunks, len(x_RD))
        for chunks in jax.lax.map(one_chunk, _chunks((x_RD, targets_R), table_VD.shape[0]))
    )
    return (entropy_R, log_z_R), (x_RD, table_VD, targets_R, log_z_R)


@jax.named_scope("cross_entropy")
def _backward(scale, softcap, axis_names, residuals, cotangents):
    x_RD, table_VD, targets_R, log_z_R = residuals
    dentropy_R, dlog_z_R = cotangents
    first = _first_token(table_VD, axis_names)

    def one_chunk(dtable_VD, chunk):
        x_cD, targets_c, log_z_c, dtarget_c, dlog_z_c = chunk
        logits_cV = _logits(x_cD, table_VD, scale, softcap)
        dlogits_cV = jnp.exp(logits_cV - log_z_c[:, None]) * dlog_z_c[:, None]
        is_target_cV = _one_hot(targets_c - first, logits_cV.shape[1])
        dlogits_cV -= jnp.where(is_target_cV, dtarget_c[:, None], 0)
        if softcap is not None:
            dlogits_cV *= 1 - jnp.square(logits_cV / softcap)
        dlogits_cV = (scale * dlogits_cV).astype(x_cD.dtype)
        dx_cD = jnp.dot(dlogits_cV, table_VD, preferred_element_type=jnp.float32)
        dtable_VD += jnp.dot(dlogits_cV.T, x_cD, preferred_element_type=jnp.float32)
        return dtable_VD, dx_cD.astype(x_cD.dtype)

    # The entropy is log_z - target.
    rows = (x_RD, targets_R, log_z_R, dentropy_R, dentropy_R + dlog_z_R)
    zeros_VD = pvary(jnp.zeros(table_VD.shape, jnp.float32))
    dtable_VD, dx = jax.lax.scan(one_chunk, zeros_VD, _chunks(rows, table_VD.shape[0]))
    return _rows(dx, len(x_RD)), dtable_VD.astype(table_VD.dtype), None


cross_entropy.defvjp(_forward, _backward)


def _logits(x_RD, table_VD, scale: float, softcap: float | None) -> jax.Array:
    logits_RV = scale * jnp.dot(x_RD, table_VD.T, preferred_element_type=jnp.float32)
    return apply_softcap(logits_RV, softcap)


def _first_token(table_VD, axis_names: tuple[str, ...]) -> jax.Array | int:
    """The first token of this device's shard of the vocabulary."""
    return jax.lax.axis_index(axis_names) * table_VD.shape[0] if axis_names else 0


def _one_hot(targets_c, vocab_size: int) -> jax.Array:
    """True at the target of each row, if it is in this shard of the vocabulary."""
    return jnp.arange(vocab_size)[None, :] == targets_c[:, None]


def _chunks(arrays, vocab_size: int):
    """Arrays (R, ...) as (chunks, c, ...), the last padded with zeros."""
    rows = len(arrays[0])
    c = min(rows, max(1, MAX_LOGITS // vocab_size))
    padding = -rows % c
    return tuple(
        jnp.pad(a, ((0, padding), *[(0, 0)] * (a.ndim - 1))).reshape(-1, c, *a.shape[1:])
        for a in arrays
    )


def _rows(chunks, rows: int):
    """The inverse of `_chunks`, of one array."""
    return chunks.reshape(-1, *chunks.shape[2:])[:rows]
