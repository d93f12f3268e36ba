"""The programs of inference: what one step computes, compiled once for each of its two shapes.

Letters: B groups of devices, U blocks of a step, Q tokens of a block, T = U*Q, D embed, V vocab,
L layers, C chosen experts.
"""

import functools

import jax
import jax.numpy as jnp

from grok import sharding
from grok.config.sampling import MAX_LOGPROBS
from grok.infer.sampling import Sampled, SamplingBatch, logprobs, sample_tokens
from grok.model.attend import PagedCache, Places
from grok.model.decoder import Grok


@functools.partial(jax.jit, donate_argnums=1)
def forward_and_sample(
    model: Grok, cache: PagedCache, tokens_BT, places: Places, settings: SamplingBatch
) -> tuple[Sampled, jax.Array, jax.Array, PagedCache]:
    """Runs new tokens and chooses one after each block's last real one.

    `settings` has rows (B, U). Returns what was chosen, (B, U), on every device, x_BTD after the
    final norm, the experts that tokens went to, experts_LBTC, and the cache.
    """
    x_BTD, cache, experts_LBTC = model.step(tokens_BT, cache, places)
    logits_BUV = model.next_logits(x_BTD, places.count_BU)
    U = logits_BUV.shape[1]
    fields, kind = jax.tree.flatten(settings)
    axes = [("batch", *(None,) * (field.ndim - 1)) for field in fields]
    fields = [sharding.constrain(field, *at) for field, at in zip(fields, axes, strict=True)]

    def local(logits_BUV, *fields):
        rows = [field.reshape(-1, *field.shape[2:]) for field in (logits_BUV, *fields)]
        chosen = sample_tokens(rows[0], jax.tree.unflatten(kind, rows[1:]), most_logprobs(model))
        return tuple(a.reshape(-1, U, *a.shape[1:]) for a in jax.tree.leaves(chosen))

    two, three = ("batch", None), ("batch", None, None)
    form = sharding.shard_map(local, (three, *axes), (two, two, three, three))
    parts = form(sharding.constrain(logits_BUV, *three), *fields)
    everywhere = [sharding.constrain(part, *(None,) * part.ndim) for part in parts]
    return Sampled(*everywhere), x_BTD, experts_LBTC, cache


@jax.jit
def score_prompt(model: Grok, x_BTD: jax.Array, next_BUQ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability of the token after each place, (B, U, Q), and the likeliest ones with
    theirs, (B, U, Q, X), from `x_BTD` that a step returned; a block at a time."""
    B, U, Q = next_BUQ.shape
    x_UBQD = jnp.moveaxis(x_BTD.reshape(B, U, Q, -1), 1, 0)

    def local(logits_BQV, next_BQ):
        rows = logits_BQV.reshape(-1, logits_BQV.shape[-1])
        found = logprobs(rows, next_BQ.reshape(-1), True, most_logprobs(model))
        return tuple(part.reshape(-1, Q, *part.shape[1:]) for part in found)

    def block(inputs):
        x_BQD, next_BQ = inputs
        two, three = ("batch", None), ("batch", None, None)
        form = sharding.shard_map(local, (three, two), (two, three, three))
        logits_BQV = sharding.constrain(model.unembed(x_BQD), *three)
        return form(logits_BQV, sharding.constrain(next_BQ, *two))

    found = jax.lax.map(block, (x_UBQD, jnp.moveaxis(jnp.asarray(next_BUQ), 1, 0)))
    moved = (jnp.moveaxis(part, 0, 1) for part in found)
    logprob, top, top_logprob = (sharding.constrain(part, *(None,) * part.ndim) for part in moved)
    return logprob, top, top_logprob


def most_logprobs(model: Grok) -> int:
    """How many of the likeliest tokens are told at most."""
    return min(MAX_LOGPROBS, model.config.vocab_size)
