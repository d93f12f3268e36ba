"""The compiled programs of inference, each compiled for the two shapes of a step.

Letters: B groups of devices, U chunks of a step, Q tokens of a chunk, T = U*Q, D embed, V vocab,
L layers, C chosen experts, X likeliest tokens.
"""

import functools

import jax
import jax.numpy as jnp

from grok import sharding
from grok.config.sampling import MAX_LOGPROBS
from grok.infer.sampling import Sampled, SamplingBatch, logprobs, sample_tokens
from grok.model.attend import PagedBatch, PagedCache
from grok.model.decoder import Decoder

TWO_AXES, THREE_AXES = ("batch", None), ("batch", None, None)


@functools.partial(jax.jit, donate_argnums=1)
def forward_and_sample(
    model: Decoder, cache: PagedCache, tokens_BT, batch: PagedBatch, sampling: SamplingBatch
) -> tuple[Sampled, jax.Array, jax.Array, PagedCache]:
    """Runs new tokens and samples one after each chunk's last one.

    `sampling` has rows (B, U). Returns the sampled tokens, (B, U), on every device, x_BTD after the
    final norm, the experts of each token, experts_LBTC, and the cache.
    """
    x_BTD, cache, experts_LBTC = model.step(tokens_BT, cache, batch)
    logits_BUV = model.next_logits(x_BTD, batch.count_BU)
    U = logits_BUV.shape[1]
    fields, structure = jax.tree.flatten(sampling)
    axes = [("batch", *(None,) * (field.ndim - 1)) for field in fields]
    fields = [sharding.constrain(field, *at) for field, at in zip(fields, axes, strict=True)]

    def local(logits_BUV, *fields):
        rows = [field.reshape(-1, *field.shape[2:]) for field in (logits_BUV, *fields)]
        row_sampling = jax.tree.unflatten(structure, rows[1:])
        sampled = sample_tokens(rows[0], row_sampling, _max_logprobs(model))
        return tuple(a.reshape(-1, U, *a.shape[1:]) for a in jax.tree.leaves(sampled))

    out_axes = (TWO_AXES, TWO_AXES, THREE_AXES, THREE_AXES)
    sharded = sharding.shard_map(local, (THREE_AXES, *axes), out_axes)
    sampled = sharded(sharding.constrain(logits_BUV, *THREE_AXES), *fields)
    return Sampled(*map(_replicate, sampled)), x_BTD, experts_LBTC, cache


@jax.jit
def score_prompt(
    model: Decoder, x_BTD: jax.Array, next_BUQ
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability of the token after each position, (B, U, Q), and the likeliest ones with
    theirs, (B, U, Q, X), from `x_BTD` that a step returned; a chunk at a time."""
    B, U, Q = next_BUQ.shape
    x_UBQD = jnp.moveaxis(x_BTD.reshape(B, U, Q, -1), 1, 0)

    def local(logits_BQV, next_BQ):
        rows = logits_BQV.reshape(-1, logits_BQV.shape[-1])
        scores = logprobs(rows, next_BQ.reshape(-1), True, _max_logprobs(model))
        return tuple(array.reshape(-1, Q, *array.shape[1:]) for array in scores)

    def score_chunk(inputs):
        x_BQD, next_BQ = inputs
        out_axes = (TWO_AXES, THREE_AXES, THREE_AXES)
        sharded = sharding.shard_map(local, (THREE_AXES, TWO_AXES), out_axes)
        logits_BQV = sharding.constrain(model.unembed(x_BQD), *THREE_AXES)
        return sharded(logits_BQV, sharding.constrain(next_BQ, *TWO_AXES))

    scores = jax.lax.map(score_chunk, (x_UBQD, jnp.moveaxis(jnp.asarray(next_BUQ), 1, 0)))
    logprob, top, top_logprob = (_replicate(jnp.moveaxis(array, 0, 1)) for array in scores)
    return logprob, top, top_logprob


def _replicate(array: jax.Array) -> jax.Array:
    return sharding.constrain(array, *(None,) * array.ndim)


def _max_logprobs(model: Decoder) -> int:
    """Likeliest tokens that are reported at most."""
    return min(MAX_LOGPROBS, model.config.vocab_size)
