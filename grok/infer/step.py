"""The compiled programs of inference, each for the two shapes of a step, and their inputs. B groups
of devices, U chunks of a step, Q tokens of a chunk, T = U*Q, D embed, V vocab, W bytes of V bits, L
layers, C chosen experts, X likeliest tokens, M pages of the longest sequence, N tokens"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grok import compiler, sharding
from grok.config import ModelConfig
from grok.config.sampling import MAX_LOGPROBS, SamplingParams
from grok.data.tokenizers import Tokenizer
from grok.infer.sampling import Sampled, SamplingBatch, logprobs, sample_tokens
from grok.infer.scheduler import ScheduledStep
from grok.model.attend import PagedBatch, PagedCache
from grok.model.decoder import Decoder

TWO_AXES, THREE_AXES = ("batch", None), ("batch", None, None)
# Fields of SamplingParams that rows have as float32, with the value that changes no logits.
NEUTRAL = {"temperature": 0, "top_p": 1, "min_p": 0}
NEUTRAL |= {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}


@functools.partial(compiler.jit, donate_argnums=1)
def forward_and_sample(
    model: Decoder, cache: PagedCache, tokens_BT, batch: PagedBatch, sampling: SamplingBatch
) -> tuple[Sampled, jax.Array, jax.Array | None, PagedCache]:
    """Runs new tokens and samples one after each chunk's last one. `sampling` has rows (B, U).
    Returns the sampled tokens, (B, U), on every device, x_BTD after the final norm, the experts of
    each token, experts_LBTC, or None without experts, and the cache."""
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


@compiler.jit
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
    return min(MAX_LOGPROBS, model.config.vocab_size)


class StepInputs:
    """Makes the inputs of a model's steps on the host."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None, mesh: Mesh):
        self._config, self._mesh = config, mesh
        self._eos_ids = () if tokenizer is None else tokenizer.eos_ids
        # Rows of the embedding table beyond the vocabulary are never chosen.
        self._unused_V = np.zeros(config.vocab_size, bool)
        if tokenizer is not None:
            self._unused_V[tokenizer.vocab_size :] = True
        self._defaults: dict[tuple[int, int], tuple[jax.Array, jax.Array]] = {}

    def paged_batch(
        self, step: ScheduledStep, size: int, max_pages: int
    ) -> tuple[np.ndarray, PagedBatch]:
        """Tokens (B, U*Q) for chunks of Q = `size`, their positions, and tables of `max_pages`, of
        which those that a sequence does not have, or no more, are 0."""
        tokens_BUQ = np.zeros((*step.shape, size), np.int32)
        table_BUM = np.zeros((*step.shape, max_pages), np.int32)
        start_BU, count_BU = np.zeros((2, *step.shape), np.int32)
        for chunk, row in step.chunks():
            end = chunk.start + chunk.count
            tokens_BUQ[row][: chunk.count] = chunk.sequence.tokens[chunk.start : end]
            pages, first = chunk.sequence.pages, chunk.sequence.first_page
            table_BUM[row][first : first + len(pages)] = pages
            start_BU[row], count_BU[row] = chunk.start, chunk.count
        return tokens_BUQ.reshape(step.shape[0], -1), PagedBatch(table_BUM, start_BU, count_BU)

    def sampling(self, step: ScheduledStep) -> SamplingBatch:
        """Sampling parameters of each chunk's sequence, (B, U, ...)."""
        shape = step.shape
        tokens_BUN = banned_BUV = None
        float32 = {name: np.full(shape, value, np.float32) for name, value in NEUTRAL.items()}
        names = ("choice", "position", "top_k", "prompt_length")
        int32 = {name: np.zeros(shape, np.int32) for name in names}
        seed_BU2, top_logprobs_BU = np.zeros((*shape, 2), np.uint32), np.zeros(shape, bool)
        for chunk, row in step.chunks():
            sequence, params = chunk.sequence, chunk.sequence.request.params
            seed_BU2[row] = params.seed & 0xFFFFFFFF, params.seed >> 32
            top_logprobs_BU[row] = bool(params.logprobs)
            for name in NEUTRAL:
                float32[name][row] = getattr(params, name)
            int32["choice"][row] = sequence.completion.choice
            int32["prompt_length"][row] = sequence.prompt_length
            int32["position"][row] = chunk.start + chunk.count
            int32["top_k"][row] = min(params.top_k, self._config.vocab_size)
            penalties = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
            if penalties != (1, 0, 0):
                tokens_BUN = self._no_tokens(shape) if tokens_BUN is None else tokens_BUN
                tokens_BUN[row][: len(sequence.tokens)] = sequence.tokens
            early = len(sequence.tokens) - sequence.prompt_length < params.min_tokens
            if params.allowed_token_ids or params.banned_token_ids or early:
                if banned_BUV is None:
                    banned_BUV = np.tile(self._unused_V, (*shape, 1))
                banned_BUV[row] = self.bans(params, early)
        default_BUN, default_BUW = self._default_rows(shape)
        return SamplingBatch(
            **{f"{name}_B": array for name, array in (float32 | int32).items()},
            seed_B2=seed_BU2,
            top_logprobs_B=top_logprobs_BU,
            tokens_BN=default_BUN if tokens_BUN is None else self._replicate(tokens_BUN),
            banned_BW=default_BUW if banned_BUV is None else self._replicate(_bits(banned_BUV)),
        )

    def bans(self, params: SamplingParams, early: bool) -> np.ndarray:
        """Mask of the tokens that a request may not get, (V,); `early`: before its min_tokens."""
        banned_V = self._unused_V.copy()
        if params.allowed_token_ids:
            banned_V[:] = True
            banned_V[list(params.allowed_token_ids)] = False
        banned_V[list(params.banned_token_ids)] = True
        if early:
            banned_V[list(params.stop_token_ids)] = True
            if not params.ignore_eos:
                banned_V[list(self._eos_ids)] = True
        return banned_V

    def _no_tokens(self, shape: tuple[int, int]) -> np.ndarray:
        return np.full((*shape, self._config.context_length), self._config.vocab_size, np.int32)

    def _default_rows(self, shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        """Tokens and bans of steps without penalties and bans: large, so kept on the devices."""
        if shape not in self._defaults:
            defaults = self._no_tokens(shape), _bits(np.tile(self._unused_V, (*shape, 1)))
            self._defaults[shape] = self._replicate(defaults[0]), self._replicate(defaults[1])
        return self._defaults[shape]

    def _replicate(self, array: np.ndarray) -> jax.Array:
        sharding = NamedSharding(self._mesh, PartitionSpec())
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _bits(banned_BUV: np.ndarray) -> np.ndarray:
    return np.packbits(banned_BUV, axis=-1, bitorder="little")
