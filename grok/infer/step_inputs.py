"""The host's side of a step's inputs: one array a step, and what changes rarely in a slot. B groups
of devices, U chunks of a step, Q tokens of a chunk, S slots, M pages of the longest sequence, N
tokens of it, V vocab, W bytes of V bits."""

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from grok.config import ModelConfig
from grok.config.sampling import SamplingParams
from grok.data.tokenizers import Tokenizer
from grok.errors import RequestError
from grok.infer.request import Request
from grok.infer.sampling import has_penalties
from grok.infer.scheduler import Chunk, ScheduledStep
from grok.infer.shapes import EngineShapes
from grok.infer.slot_state import (
    NEUTRAL_WORDS,
    DecodeInputs,
    PrefillInputs,
    SlotState,
    bias_words,
    sampling_words,
    set_banned,
    set_bias,
    set_history,
)

Slot = tuple[int, int]  # group, and slot in it, or chunk of a step
PADDING = (0, 0, 0, 0, 0)  # words of a slot without a token


class StepInputs:
    """Makes the inputs of a model's steps, and remembers the bans that each slot has."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None, shapes: EngineShapes):
        self._config, self._shapes = config, shapes
        self._eos_ids = () if tokenizer is None else tokenizer.eos_ids
        # Rows of the embedding table beyond the vocabulary are never chosen.
        self._unused_V = np.zeros(config.vocab_size, bool)
        if tokenizer is not None:
            self._unused_V[tokenizer.vocab_size :] = True
        self._banned: dict[Slot, tuple[SamplingParams, bool]] = {}  # where they are not the default

    @property
    def unused_W(self) -> np.ndarray:
        """Bits of the tokens that no request may get."""
        return _bits(self._unused_V)

    def words(self, step: ScheduledStep) -> DecodeInputs | PrefillInputs:
        """Words of a step for the devices, in an array of its own: they may read it after the next
        one was made."""
        return self._prefill_words(step) if step.prefill else self._decode_words(step)

    def _decode_words(self, step: ScheduledStep) -> DecodeInputs:
        words: list[int] = []
        for chunk in itertools.chain.from_iterable(step.chunks_BU):
            words += PADDING if chunk is None else self._token_words(chunk)
        return DecodeInputs(np.array(words, np.int32).reshape(*step.shape, len(PADDING)))

    def _token_words(self, chunk: Chunk) -> tuple[int, int, int, int, int]:
        sequence, start = chunk.sequence, chunk.start
        index, tokens = start // self._shapes.page_size, sequence.tokens
        token = tokens[start] if start < len(tokens) else -1
        return token, start, chunk.count, index, sequence.pages[index - sequence.first_page]

    def _prefill_words(self, step: ScheduledStep) -> PrefillInputs:
        shapes = self._shapes
        slot_BU = np.full((*step.shape, 1), shapes.slots, np.int32)
        start_count_BU2 = np.zeros((*step.shape, 2), np.int32)
        words_BUF = np.tile(NEUTRAL_WORDS, (*step.shape, 1))
        table_BUM = np.zeros((*step.shape, shapes.table_length), np.int32)
        tokens_BUQ = np.zeros((*step.shape, shapes.page_size), np.int32)
        for chunk, row in step.chunks():
            sequence, end = chunk.sequence, chunk.start + chunk.count
            start_count_BU2[row] = chunk.start, chunk.count
            first = sequence.first_page
            table_BUM[row][first : first + len(sequence.pages)] = sequence.pages
            tokens_BUQ[row][: chunk.count] = sequence.tokens[chunk.start : end]
            if end == sequence.prompt_length:
                slot_BU[row] = sequence.slot
                choice, length = sequence.completion.choice, sequence.prompt_length
                vocab_size = self._config.vocab_size
                words_BUF[row] = sampling_words(sequence.request.params, choice, length, vocab_size)
        arrays = slot_BU, start_count_BU2, words_BUF, table_BUM, tokens_BUQ
        return PrefillInputs(np.concatenate(arrays, axis=-1))

    def targets(self, step: ScheduledStep, scored: list[tuple[Chunk, Slot]]) -> np.ndarray:
        """The token of its prompt after each token of these chunks, (B, U, Q)."""
        next_BUQ = np.zeros((*step.shape, self._shapes.page_size), np.int32)
        for chunk, row in scored:
            first = chunk.start + 1
            targets = chunk.sequence.request.prompt[first : first + chunk.count]
            next_BUQ[row][: len(targets)] = targets
        return next_BUQ

    def slot_updates(
        self, step: ScheduledStep
    ) -> Iterator[tuple[Callable[..., SlotState], Slot, np.ndarray]]:
        """Programs that change a slot before this step, the slot, and its new row."""
        for chunk, (group, _) in step.chunks() if step.prefill else ():
            sequence = chunk.sequence
            if chunk.start + chunk.count == sequence.prompt_length:
                slot, request = (group, sequence.slot), sequence.request
                yield from ((update, slot, row) for update, row in self._first_rows(request))
        yield from ((set_banned, slot, banned_W) for slot, banned_W in self._bans(step))

    def _first_rows(
        self, request: Request
    ) -> Iterator[tuple[Callable[..., SlotState], np.ndarray]]:
        """Rows that the devices get of a request when its prompt ends, if it has penalties or
        biases: the prompt, (N,), to which they append what is decoded, and the biases, (X,)."""
        params = request.params
        if has_penalties(
            params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        ):
            tokens_N = np.zeros(self._config.context_length, np.int32)
            tokens_N[: len(request.prompt)] = request.prompt
            yield set_history, tokens_N
        if params.logit_bias:
            yield set_bias, bias_words(params.logit_bias, self._config.vocab_size)

    def _bans(self, step: ScheduledStep) -> Iterator[tuple[Slot, np.ndarray]]:
        """Slots whose tokens that may not be chosen differ from the last step's, with those as
        bits, (W,)."""
        for chunk, (group, _) in step.chunks():
            sequence, params = chunk.sequence, chunk.sequence.request.params
            end, slot = chunk.start + chunk.count, (group, sequence.slot)
            if end < sequence.prompt_length:
                continue
            early = end - sequence.prompt_length < params.min_tokens
            bans = params.allowed_token_ids or params.banned_token_ids or params.logit_bias
            if bans or early:
                if self._banned.get(slot) != (params, early):
                    self._banned[slot] = params, early
                    yield slot, _bits(self.banned(params, early))
            elif self._banned.pop(slot, None) is not None:
                yield slot, self.unused_W

    def check_bans(self, params: SamplingParams) -> None:
        """Raises RequestError where a request may get no token at all."""
        if self.banned(params, early=params.min_tokens > 0).all():
            names = ("allowed_token_ids", "banned_token_ids", "logit_bias")
            name = next(name for name in names if getattr(params, name))
            message = f"{name} leaves no token that may be chosen; one such token would work."
            raise RequestError(name, message)

    def banned(self, params: SamplingParams, early: bool) -> np.ndarray:
        """Mask of the tokens that a request may not get, (V,); `early`: before its min_tokens."""
        banned_V = self._unused_V.copy()
        if params.allowed_token_ids:
            banned_V[:] = True
            banned_V[list(params.allowed_token_ids)] = False
        banned_V[list(params.never_chosen)] = True
        if early:
            banned_V[list(params.stop_token_ids)] = True
            if not params.ignore_eos:
                banned_V[list(self._eos_ids)] = True
        return banned_V


def _bits(banned_V: np.ndarray) -> np.ndarray:
    return np.packbits(banned_V, axis=-1, bitorder="little")
