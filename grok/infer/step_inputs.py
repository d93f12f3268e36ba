"""Host-side inputs of a step: a schedule as the arrays that the compiled program takes.

Letters: B groups of devices, U chunks of a step, Q tokens of a chunk, M pages of the longest
sequence, N its tokens, V vocab, W bytes of V bits.
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grok.config import ModelConfig
from grok.config.sampling import SamplingParams
from grok.data.tokenizers import Tokenizer
from grok.infer.sampling import SamplingBatch
from grok.infer.scheduler import Chunk, ScheduledStep
from grok.model.attend import PagedBatch


class StepInputs:
    """Makes the inputs of steps for a model and, if there is one, its tokenizer."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None, mesh: Mesh):
        self._config, self._mesh = config, mesh
        self._eos = -1 if tokenizer is None else tokenizer.eos_id
        # Rows of the embedding table beyond the vocabulary are never chosen.
        self._unused_V = np.zeros(config.vocab_size, bool)
        if tokenizer is not None:
            self._unused_V[tokenizer.vocab_size :] = True
        self._defaults: dict[tuple[int, int], tuple[jax.Array, jax.Array]] = {}

    def paged_batch(
        self, step: ScheduledStep, size: int, max_pages: int
    ) -> tuple[np.ndarray, PagedBatch]:
        """Tokens (B, U*Q) for chunks of Q = `size` tokens, and their positions and pages, in tables
        of M = `max_pages`."""
        tokens_BUQ = np.zeros((*step.shape, size), np.int32)
        table_BUM = np.zeros((*step.shape, max_pages), np.int32)
        start_BU, count_BU = np.zeros((2, *step.shape), np.int32)
        for chunk, row in step.chunks():
            end = chunk.start + chunk.count
            tokens_BUQ[row][: chunk.count] = chunk.sequence.tokens[chunk.start : end]
            table_BUM[row][: len(chunk.sequence.pages)] = chunk.sequence.pages
            start_BU[row], count_BU[row] = chunk.start, chunk.count
        return tokens_BUQ.reshape(step.shape[0], -1), PagedBatch(table_BUM, start_BU, count_BU)

    def sampling(self, step: ScheduledStep) -> SamplingBatch:
        """Sampling parameters of each chunk's sequence, (B, U, ...)."""
        shape = step.shape
        tokens_BUN, banned_BUV = None, None
        batch = _neutral(shape)
        for chunk, row in step.chunks():
            sequence, params = chunk.sequence, chunk.sequence.request.params
            self._set_row(batch, row, chunk)
            penalties = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
            if penalties != (1, 0, 0):
                tokens_BUN = self._no_tokens(shape) if tokens_BUN is None else tokens_BUN
                tokens_BUN[row][: len(sequence.tokens)] = sequence.tokens
            early = len(sequence.tokens) - sequence.prompt_length < params.min_tokens
            if params.allowed_token_ids or params.banned_token_ids or early:
                banned_BUV = self._no_bans(shape) if banned_BUV is None else banned_BUV
                banned_BUV[row] = self.bans(params, early)
        default_BUN, default_BUW = self._default_rows(shape)
        batch.tokens_BN = default_BUN if tokens_BUN is None else self._replicate(tokens_BUN)
        batch.banned_BW = default_BUW if banned_BUV is None else self._replicate(_bits(banned_BUV))
        return batch

    def _set_row(self, batch: SamplingBatch, row: tuple[int, int], chunk: Chunk) -> None:
        sequence, params = chunk.sequence, chunk.sequence.request.params
        batch.seed_B2[row] = params.seed & 0xFFFFFFFF, params.seed >> 32
        batch.choice_B[row] = sequence.choice
        batch.position_B[row] = chunk.start + chunk.count
        batch.temperature_B[row] = params.temperature
        batch.top_k_B[row] = min(params.top_k, self._config.vocab_size)
        batch.top_p_B[row], batch.min_p_B[row] = params.top_p, params.min_p
        batch.repetition_B[row] = params.repetition_penalty
        batch.presence_B[row] = params.presence_penalty
        batch.frequency_B[row] = params.frequency_penalty
        batch.prompt_length_B[row] = sequence.prompt_length
        batch.top_logprobs_B[row] = bool(params.logprobs)

    def bans(self, params: SamplingParams, early: bool) -> np.ndarray:
        """Mask of the tokens that a request may not get, (V,); `early`: before its min_tokens."""
        banned_V = self._unused_V.copy()
        if params.allowed_token_ids:
            banned_V[:] = True
            banned_V[list(params.allowed_token_ids)] = False
        banned_V[list(params.banned_token_ids)] = True
        if early:
            banned_V[list(params.stop_token_ids)] = True
            if self._eos >= 0 and not params.ignore_eos:
                banned_V[self._eos] = True
        return banned_V

    def _no_tokens(self, shape: tuple[int, int]) -> np.ndarray:
        return np.full((*shape, self._config.context_length), self._config.vocab_size, np.int32)

    def _no_bans(self, shape: tuple[int, int]) -> np.ndarray:
        return np.broadcast_to(self._unused_V, (*shape, len(self._unused_V))).copy()

    def _default_rows(self, shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        """Tokens and bans of steps without penalties and bans: large, so kept on the devices."""
        if shape not in self._defaults:
            arrays = self._no_tokens(shape), _bits(self._no_bans(shape))
            self._defaults[shape] = self._replicate(arrays[0]), self._replicate(arrays[1])
        return self._defaults[shape]

    def _replicate(self, array: np.ndarray) -> jax.Array:
        sharding = NamedSharding(self._mesh, PartitionSpec())
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _neutral(shape: tuple[int, int]) -> SamplingBatch:
    """Parameters that change no logits, for every row; without tokens and bans."""
    float32 = {name: np.zeros(shape, np.float32) for name in ("temperature_B", "min_p_B")}
    float32 |= {name: np.zeros(shape, np.float32) for name in ("presence_B", "frequency_B")}
    float32 |= {name: np.ones(shape, np.float32) for name in ("top_p_B", "repetition_B")}
    names = ("choice_B", "position_B", "top_k_B", "prompt_length_B")
    int32 = {name: np.zeros(shape, np.int32) for name in names}
    return SamplingBatch(
        **float32,
        **int32,
        seed_B2=np.zeros((*shape, 2), np.uint32),
        top_logprobs_B=np.zeros(shape, bool),
        tokens_BN=None,
        banned_BW=None,
    )


def _bits(banned_BUV: np.ndarray) -> np.ndarray:
    return np.packbits(banned_BUV, axis=-1, bitorder="little")
