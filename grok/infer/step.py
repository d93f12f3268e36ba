"""The compiled programs of inference. B groups of devices, U chunks of a step, Q tokens of a chunk,
T = U*Q, D embed, V vocab, L layers, C chosen experts, X likeliest tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from grok import compiler, sharding
from grok.config.sampling import MAX_LOGPROBS
from grok.infer.sampling import Sampled, logprobs, sample_tokens
from grok.infer.slot_state import DecodeInputs, PrefillInputs, SlotState, StepRows, map_groups
from grok.model.attend import PagedBatch, PagedCache
from grok.model.decoder import Decoder
from grok.model.flat import FlatModel, modules_of

TWO_AXES, THREE_AXES = ("batch", None), ("batch", None, None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class StepResult:
    """Results of a step. The first two are on every device, floats as the words of their bits,
    so that the host fetches one array, or two."""

    sampled_BU2: jax.Array  # token and log-probability
    top_BU2X: jax.Array  # likeliest tokens and log-probabilities
    x_BTD: jax.Array  # after the final norm
    experts_LBTC: jax.Array | None  # None without experts


@functools.partial(compiler.jit, donate_argnums=(1, 2))
def forward_and_sample(
    model: Decoder | FlatModel,
    cache: PagedCache,
    slots: SlotState,
    inputs: DecodeInputs | PrefillInputs,
) -> tuple[StepResult, PagedCache, SlotState]:
    """Runs new tokens and samples one after each chunk's last one: the program of a decode or of a
    prefill, by the type of `inputs`. The next step finds the tokens in the slots that it returns,
    whether or not the host has seen them."""
    model = modules_of(model)
    rows, slots = map_groups(lambda inputs, slots: inputs.rows(slots), inputs, slots)
    batch = PagedBatch(rows.table_UM, rows.start_U, rows.count_U)
    tokens_BT = rows.tokens_UQ.reshape(rows.tokens_UQ.shape[0], -1)
    x_BTD, cache, experts_LBTC = model.step(tokens_BT, cache, batch)
    logits_BUV = model.next_logits(x_BTD, batch.count_BU)

    def sample(logits_UV, rows: StepRows, inputs, slots):
        sampled = sample_tokens(logits_UV, rows.sampling(), _max_logprobs(model))
        return _pack(sampled), inputs.store(slots, sampled.token_B)

    (sampled, top), slots = map_groups(sample, logits_BUV, rows, inputs, slots)
    result = StepResult(_replicate(sampled), _replicate(top), x_BTD, experts_LBTC)
    return result, cache, slots


def _pack(sampled: Sampled) -> tuple[jax.Array, jax.Array]:
    def words(array):
        return jax.lax.bitcast_convert_type(array, jnp.int32)

    sampled_U2 = jnp.stack([sampled.token_B, words(sampled.logprob_B)], axis=1)
    return sampled_U2, jnp.stack([sampled.top_BX, words(sampled.top_logprob_BX)], axis=1)


@functools.partial(compiler.jit, donate_argnums=1)
def score_prompt(
    model: Decoder | FlatModel, slots: SlotState, x_BTD: jax.Array, next_BUQ
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], SlotState]:
    """Log-probability of the token after each position, (B, U, Q), and the likeliest ones with
    theirs, (B, U, Q, X), from `x_BTD` that a step returned; a chunk at a time. The slots are as
    before: the next step, which takes them, waits for this program. CPU devices run programs that
    do not wait for each other at once, and then their collectives may mix."""
    model = modules_of(model)
    B, U, Q = next_BUQ.shape
    x_UBQD = jnp.moveaxis(x_BTD.reshape(B, U, Q, -1), 1, 0)

    def local(logits_BQV, next_BQ):
        rows = logits_BQV.reshape(-1, logits_BQV.shape[-1])
        scores = logprobs(rows, next_BQ.reshape(-1), True, _max_logprobs(model))
        return tuple(array.reshape(-1, Q, *array.shape[1:]) for array in scores)

    def by_group(logits_BQV, next_BQ):
        out_axes = (TWO_AXES, THREE_AXES, THREE_AXES)
        return sharding.shard_map(local, (THREE_AXES, TWO_AXES), out_axes)(logits_BQV, next_BQ)

    def score_chunk(inputs):
        x_BQD, next_BQ = inputs
        logits_BQV = sharding.constrain(model.unembed(x_BQD), *THREE_AXES)
        next_BQ = sharding.constrain(next_BQ, *TWO_AXES)
        return sharding.without_trivial_mesh(by_group)(logits_BQV, next_BQ)

    scores = jax.lax.map(score_chunk, (x_UBQD, jnp.moveaxis(jnp.asarray(next_BUQ), 1, 0)))
    logprob, top, top_logprob = (_replicate(jnp.moveaxis(array, 0, 1)) for array in scores)
    return jax.lax.optimization_barrier(((logprob, top, top_logprob), slots))


@functools.partial(jax.jit, donate_argnums=0)
def clear_cache(cache: PagedCache) -> PagedCache:
    """The cache with zeros in all its pages."""
    return jax.tree.map(jnp.zeros_like, cache)


def _replicate(array: jax.Array) -> jax.Array:
    return sharding.constrain(array, *(None,) * array.ndim)


def _max_logprobs(model: Decoder) -> int:
    return min(MAX_LOGPROBS, model.config.vocab_size)
