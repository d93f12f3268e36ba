"""From logits to the next token: biases, penalties, bans, temperature, filters, and
log-probabilities. Work that few requests ask for is a branch, taken when any row asks; other rows
stay as they are. B rows, V vocab, N tokens of a sequence, W bytes of V bits, K tokens with biases,
X likeliest tokens, or words of biases."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from grok import sharding
from grok.ops.cpu import calls, few_rows
from grok.ops.cross_entropy import target_and_log_z

REMOVED = -jnp.inf  # the logit of a token that must not be drawn, whatever the temperature
# Bounds within which finite logits stay finite and in their order when they are divided.
MAX_SCORE, MIN_TEMPERATURE = 1e18, 1e-18


def nucleus(logits_BV: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """Logits with all but each row's nucleus set to -inf, float32. The release's definition: going
    up from the least likely token, the first whose cumulative probability reaches 1 - p is the
    threshold; it and all that are no less likely stay. p = 0 keeps the likeliest token and its
    ties, p = 1 keeps all. The release sums in the logits' type, which for bfloat16 filters nothing
    at p = 0.999; this sums in float32."""
    logits_BV = logits_BV.astype(jnp.float32)
    ascending_BV = jnp.sort(logits_BV, axis=-1)
    reached_BV = jnp.cumsum(jax.nn.softmax(ascending_BV, axis=-1), axis=-1) >= 1 - top_p_B[:, None]
    # Rounding may leave the total a little under 1: the last position always counts as reached.
    rank_B = jnp.where(reached_BV[:, -1], jnp.argmax(reached_BV, axis=-1), logits_BV.shape[-1] - 1)
    threshold_B1 = jnp.take_along_axis(ascending_BV, rank_B[:, None], axis=-1)
    return jnp.where(logits_BV >= threshold_B1, logits_BV, REMOVED)


def top_k(logits_BV: jax.Array, top_k_B: jax.Array) -> jax.Array:
    """Logits with all but each row's k largest, and ties with the k-th, set to -inf; 0: all."""
    descending_BV = -jnp.sort(-logits_BV, axis=-1)
    rank_B = jnp.clip(top_k_B - 1, 0, logits_BV.shape[-1] - 1)
    threshold_B1 = jnp.take_along_axis(descending_BV, rank_B[:, None], axis=-1)
    return jnp.where((top_k_B[:, None] == 0) | (logits_BV >= threshold_B1), logits_BV, REMOVED)


def min_p(logits_BV: jax.Array, min_p_B: jax.Array) -> jax.Array:
    """Logits of tokens less likely than min_p times the likeliest set to -inf."""
    threshold_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(min_p_B)[:, None]
    return jnp.where(logits_BV >= threshold_B1, logits_BV, REMOVED)


def sample(
    keys_B: jax.Array,
    logits_BV: jax.Array,
    temperature_B: jax.Array,
    top_p_B: jax.Array,
    top_k_B: jax.Array | None = None,
    min_p_B: jax.Array | None = None,
    banned_BW: jax.Array | None = None,
) -> jax.Array:
    """One token a row, tokens_B int32: the likeliest where temperature is 0, drawn elsewhere, and
    never one of which the bit of `banned_BW` is set. Each row is drawn with its own key, so that a
    row's token does not depend on its neighbours."""
    logits_BV = jnp.clip(logits_BV.astype(jnp.float32), -MAX_SCORE, MAX_SCORE)

    def allowed(scores_BV: jax.Array) -> jax.Array:
        # After all arithmetic: -inf divided by a temperature, or less a penalty, may be no number.
        if banned_BW is None:
            return scores_BV
        return jnp.where(_unpack_bits(banned_BW, scores_BV.shape[-1]), REMOVED, scores_BV)

    if banned_BW is not None and _has_kernels():
        greedy_B = calls.argmax(logits_BV, banned_BW)
    else:
        greedy_B = jnp.argmax(allowed(logits_BV), axis=-1)

    def draw() -> jax.Array:
        divisor_B = jnp.where(temperature_B > 0, jnp.maximum(temperature_B, MIN_TEMPERATURE), 1)
        filtered_BV = allowed(logits_BV / divisor_B[:, None])
        if top_k_B is not None:
            filtered_BV = _where_any(top_k_B > 0, lambda x: top_k(x, top_k_B), filtered_BV)
        filtered_BV = _where_any(top_p_B < 1, lambda x: nucleus(x, top_p_B), filtered_BV)
        if min_p_B is not None:
            filtered_BV = _where_any(min_p_B > 0, lambda x: min_p(x, min_p_B), filtered_BV)
        return jax.vmap(jax.random.categorical)(keys_B, filtered_BV)

    drawn_B = jax.lax.cond(jnp.any(temperature_B > 0), draw, lambda: greedy_B)
    return jnp.where(temperature_B > 0, drawn_B, greedy_B).astype(jnp.int32)


def _has_kernels() -> bool:
    """True where the kernels in C can be called: on one device, and without a mesh."""
    return sharding.ambient_mesh() is None and few_rows.is_usable()


def _where_any(asked_B, change, x):
    return jax.lax.cond(jnp.any(asked_B), change, lambda x: x, x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class SamplingBatch:
    """SamplingParams of each row, as NumPy or JAX arrays; leading axes may be more than B."""

    seed_B2: Any  # two words, uint32
    choice_B: Any
    position_B: Any  # of the new token in its sequence
    temperature_B: Any
    top_k_B: Any
    top_p_B: Any
    min_p_B: Any
    repetition_penalty_B: Any
    presence_penalty_B: Any
    frequency_penalty_B: Any
    prompt_length_B: Any
    top_logprobs_B: Any  # true where the likeliest tokens are asked for
    tokens_BN: Any  # prompt and answer of rows with penalties, up to position
    banned_BW: Any  # a bit for each token of the vocabulary, the lowest first
    biased_B: Any  # true where there are biases
    bias_BX: Any  # tokens, V where there are no more, and after them the bits of their biases


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Sampled:
    """The new token of each row, its log-probability, and the likeliest tokens with theirs."""

    token_B: jax.Array
    logprob_B: jax.Array
    top_BX: jax.Array
    top_logprob_BX: jax.Array


def sample_tokens(logits_BV: jax.Array, s: SamplingBatch, top: int) -> Sampled:
    """The next token of every row, drawn by (seed, choice, position), and log-probabilities by the
    unchanged logits: of it and, where any row asks, of the `top` likeliest."""
    keys_B = jax.vmap(_key)(s.seed_B2, s.choice_B, s.position_B)
    scores_BV = penalized(biased(logits_BV, s), s)
    settings = s.temperature_B, s.top_p_B, s.top_k_B, s.min_p_B
    token_B = sample(keys_B, scores_BV, *settings, s.banned_BW)
    return Sampled(token_B, *logprobs(logits_BV, token_B, jnp.any(s.top_logprobs_B), top))


def _unpack_bits(bits_BW: jax.Array, length: int) -> jax.Array:
    """True where one of the first `length` bits is set, the lowest of a byte first."""
    bits_BW8 = (bits_BW[:, :, None] >> jnp.arange(8, dtype=jnp.uint8)[None, None, :]) & 1
    return bits_BW8.reshape(len(bits_BW8), -1)[:, :length] > 0


def logprobs(logits_BV: jax.Array, token_B: jax.Array, with_top, top: int):
    """Log-probability of each row's token; the `top` likeliest tokens and theirs, zeros unless
    `with_top`."""
    if _has_kernels():
        target_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
        log_z_B = calls.logsumexp(logits_BV)
    else:
        target_B, log_z_B = target_and_log_z(logits_BV, token_B)

    def likeliest():
        value_BX, token_BX = jax.lax.top_k(logits_BV, top)
        return token_BX, value_BX - log_z_B[:, None]

    def zeros():
        zero_BX = jnp.zeros((1, top), jnp.float32) * log_z_B[:, None]
        return jnp.zeros((1, top), jnp.int32) * token_B[:, None], zero_BX

    return target_B - log_z_B, *jax.lax.cond(with_top, likeliest, zeros)


def biased(logits_BV: jax.Array, s: SamplingBatch) -> jax.Array:
    """Logits with the biases of some tokens added, before penalties, as vLLM does it. Tokens with
    the bias that bans are among `banned_BW` too."""

    def change(logits_BV):
        row_B1 = jnp.arange(len(logits_BV))[:, None]
        tokens_BK, words_BK = jnp.split(s.bias_BX, 2, axis=1)
        tokens_BK = jnp.where(s.biased_B[:, None], tokens_BK, logits_BV.shape[-1])
        biases_BK = jax.lax.bitcast_convert_type(words_BK, jnp.float32).astype(logits_BV.dtype)
        return logits_BV.at[row_B1, tokens_BK].add(biases_BK, mode="drop")

    return _where_any(s.biased_B, change, logits_BV)


def penalized(logits_BV: jax.Array, s: SamplingBatch) -> jax.Array:
    """Logits after penalties. Repetition (Keskar et al. 2019) divides positive logits of tokens in
    prompt or answer, and multiplies negative ones. Presence is subtracted from logits of tokens in
    the answer, frequency once for each occurrence."""

    def change(logits_BV):
        row_B1 = jnp.arange(len(logits_BV))[:, None]
        none_BV = jnp.zeros_like(logits_BV)
        index_1N = jnp.arange(s.tokens_BN.shape[1])[None, :]
        tokens_BN = jnp.where(index_1N < s.position_B[:, None], s.tokens_BN, logits_BV.shape[-1])
        seen_BV = none_BV.at[row_B1, tokens_BN].set(1.0, mode="drop")
        answer_BN = (index_1N >= s.prompt_length_B[:, None]).astype(logits_BV.dtype)
        times_BV = none_BV.at[row_B1, tokens_BN].add(answer_BN, mode="drop")
        factor_B1 = s.repetition_penalty_B[:, None]
        changed_BV = jnp.where(logits_BV > 0, logits_BV / factor_B1, logits_BV * factor_B1)
        # Infinity less the infinity of a huge penalty would be no number.
        changed_BV = jnp.clip(changed_BV, -MAX_SCORE, MAX_SCORE)
        logits_BV = jnp.where(seen_BV > 0, changed_BV, logits_BV)
        logits_BV -= s.frequency_penalty_B[:, None] * times_BV
        return logits_BV - s.presence_penalty_B[:, None] * (times_BV > 0).astype(logits_BV.dtype)

    asked_B = has_penalties(s.repetition_penalty_B, s.presence_penalty_B, s.frequency_penalty_B)
    return _where_any(asked_B, change, logits_BV)


def has_penalties(repetition, presence, frequency):
    """True where these penalties, numbers or arrays, change logits."""
    return (repetition != 1) | (presence != 0) | (frequency != 0)


def _key(words_2, choice, position):
    key = jax.random.wrap_key_data(words_2, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(key, choice), position)
