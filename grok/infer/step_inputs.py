"""What the scheduler decided, as the arrays that a step takes.

Letters: B groups of devices, U blocks of a step, Q tokens of a block, M pages of the longest
sequence, N its tokens, V vocab, W bytes of V bits.
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grok.config import GrokConfig
from grok.config.sampling import SamplingParams
from grok.data.tokenizers import Tokenizer
from grok.infer.sampling import SamplingBatch
from grok.infer.scheduler import ScheduledStep
from grok.model.attend import Places


class StepInputs:
    """Makes arrays for a model and, if there is one, its tokenizer."""

    def __init__(self, config: GrokConfig, tokenizer: Tokenizer | None, mesh: Mesh):
        self._config, self._mesh = config, mesh
        self._end = -1 if tokenizer is None else tokenizer.eos_id
        # Entries of the table that stand for no piece are never chosen.
        self._nothing_V = np.zeros(config.vocab_size, bool)
        if tokenizer is not None:
            self._nothing_V[tokenizer.vocab_size :] = True
        self._usual: dict[tuple[int, int], tuple[jax.Array, jax.Array]] = {}

    def paged_batch(
        self, step: ScheduledStep, size: int, longest: int
    ) -> tuple[np.ndarray, Places]:
        """Tokens (B, U*Q) and where they stand, for blocks of Q = `size` tokens and tables of M =
        `longest` pages."""
        tokens_BUQ = np.zeros((*step.shape, size), np.int32)
        table_BUM = np.zeros((*step.shape, longest), np.int32)
        start_BU, count_BU = np.zeros((2, *step.shape), np.int32)
        for block, row in step.blocks():
            end = block.start + block.count
            tokens_BUQ[row][: block.count] = block.sequence.tokens[block.start : end]
            table_BUM[row][: len(block.sequence.pages)] = block.sequence.pages
            start_BU[row], count_BU[row] = block.start, block.count
        return tokens_BUQ.reshape(step.shape[0], -1), Places(table_BUM, start_BU, count_BU)

    def sampling(self, step: ScheduledStep) -> SamplingBatch:
        """What each block asks of sampling, (B, U, ...)."""
        shape = step.shape

        def full(value: float, dtype: str = "float32") -> np.ndarray:
            return np.full(shape, value, dtype)

        tokens_BUN, banned_BUV = None, None
        s = SamplingBatch(
            key_B2=np.zeros((*shape, 2), np.uint32),
            choice_B=full(0, "int32"),
            position_B=full(0, "int32"),
            temperature_B=full(0),
            top_k_B=full(0, "int32"),
            top_p_B=full(1),
            min_p_B=full(0),
            repetition_B=full(1),
            presence_B=full(0),
            frequency_B=full(0),
            prompt_length_B=full(0, "int32"),
            top_logprobs_B=full(0, "bool"),
            tokens_BN=None,
            banned_BW=None,
        )
        for block, row in step.blocks():
            sequence, params = block.sequence, block.sequence.request.params
            s.key_B2[row] = params.seed & 0xFFFFFFFF, params.seed >> 32
            s.choice_B[row] = sequence.choice
            s.position_B[row] = block.start + block.count
            s.temperature_B[row] = params.temperature
            s.top_k_B[row] = min(params.top_k, self._config.vocab_size)
            s.top_p_B[row], s.min_p_B[row] = params.top_p, params.min_p
            s.repetition_B[row] = params.repetition_penalty
            s.presence_B[row] = params.presence_penalty
            s.frequency_B[row] = params.frequency_penalty
            s.prompt_length_B[row] = sequence.prompt_length
            s.top_logprobs_B[row] = bool(params.logprobs)
            penalties = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
            if penalties != (1, 0, 0):
                tokens_BUN = self._no_tokens(shape) if tokens_BUN is None else tokens_BUN
                tokens_BUN[row][: len(sequence.tokens)] = sequence.tokens
            early = len(sequence.tokens) - sequence.prompt_length < params.min_tokens
            if params.allowed_token_ids or params.banned_token_ids or early:
                banned_BUV = self._no_bans(shape) if banned_BUV is None else banned_BUV
                banned_BUV[row] = self.bans(params, early)
        usual_BUN, usual_BUW = self._usual_rows(shape)
        s.tokens_BN = usual_BUN if tokens_BUN is None else self._put(tokens_BUN)
        s.banned_BW = usual_BUW if banned_BUV is None else self._put(_bits(banned_BUV))
        return s

    def bans(self, params: SamplingParams, early: bool) -> np.ndarray:
        """Which tokens a request may not have; `early`: it has not its min_tokens yet. (V,)"""
        banned_V = self._nothing_V.copy()
        if params.allowed_token_ids:
            banned_V[:] = True
            banned_V[list(params.allowed_token_ids)] = False
        banned_V[list(params.banned_token_ids)] = True
        if early:
            banned_V[list(params.stop_token_ids)] = True
            if self._end >= 0 and not params.ignore_eos:
                banned_V[self._end] = True
        return banned_V

    def _no_tokens(self, shape: tuple[int, int]) -> np.ndarray:
        return np.full((*shape, self._config.context_length), self._config.vocab_size, np.int32)

    def _no_bans(self, shape: tuple[int, int]) -> np.ndarray:
        return np.broadcast_to(self._nothing_V, (*shape, len(self._nothing_V))).copy()

    def _usual_rows(self, shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        """What is large and nearly always the same, on the devices: no penalties and no bans."""
        if shape not in self._usual:
            parts = self._no_tokens(shape), _bits(self._no_bans(shape))
            self._usual[shape] = self._put(parts[0]), self._put(parts[1])
        return self._usual[shape]

    def _put(self, array: np.ndarray) -> jax.Array:
        place = NamedSharding(self._mesh, PartitionSpec())
        return jax.make_array_from_callback(array.shape, place, lambda index: array[index])


def _bits(banned_BUV: np.ndarray) -> np.ndarray:
    return np.packbits(banned_BUV, axis=-1, bitorder="little")
