"""Batches of rows cut from a token stream, each a pure function of (data, seed, step).
B rows of a batch, T tokens of a row, S tokens of the stream."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import numpy as np

from grok.data.batch_schedule import Batch, BatchSchedule
from grok.data.text_files import text_files
from grok.data.tokenizers.tokenizer import Tokenizer, read_text, start_ids
from grok.errors import DataError


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenStream:
    """Documents end to end, each ended by `eos_id` and, where a tokenizer adds it, begun by bos."""

    tokens_S: np.ndarray  # int32
    num_bytes: int  # UTF-8 bytes of the text; eos has none
    eos_id: int


def read_stream(paths: Sequence[str | Path], tokenizer: Tokenizer, vocab_size: int) -> TokenStream:
    """Tokenizes text files, a document each, for a model of `vocab_size` tokens; `paths` may be
    folders and patterns. DataError when there are no files, a file cannot be read, the tokenizer
    has no end-of-sequence token, or a token is not below `vocab_size`."""
    if not paths:
        raise DataError("no text files were given (data.train, data.validation); one would work.")
    if tokenizer.eos_id < 0:
        problem = "the tokenizer has no end-of-sequence token to end documents with"
        raise DataError(f"{problem}; one that `grok data tokenizer` trained would work.")
    documents, num_bytes = [], 0
    for path in text_files([str(path) for path in paths]):
        text = read_text(path)
        try:
            ids = [*start_ids(tokenizer), *tokenizer.encode(text), tokenizer.eos_id]
        except DataError as error:
            raise DataError(f"text file {path}: {error}") from None
        document_S = np.array(ids, np.int32)
        if document_S.max() >= vocab_size:
            problem = f"text file {path} has token {document_S.max()}, but model.vocab_size="
            right = f"model.vocab_size={tokenizer.vocab_size}, as the tokenizer has, would work"
            raise DataError(f"{problem}{vocab_size}; {right}.")
        documents.append(document_S)
        num_bytes += len(text.encode())
    tokens_S = np.concatenate(documents)
    return TokenStream(tokens_S=tokens_S, num_bytes=num_bytes, eos_id=tokenizer.eos_id)


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Summed loss of a text in nats, as bits per UTF-8 byte: comparable across tokenizers."""
    return nats / math.log(2) / num_bytes


class StreamBatches:
    """Training batches by step number, without end. The stream is a ring, cut into S // T windows
    of T + 1 tokens that overlap by one: the last target of a window is the first input of the next.
    Every epoch cuts at a new random offset and visits every window once in a new random order;
    fewer than T tokens are left out of an epoch. A batch may hold the end of one epoch and the
    beginning of the next."""

    def __init__(self, stream: TokenStream, schedule: BatchSchedule, *, seed: int) -> None:
        """Cuts `stream` into rows; DataError when it is shorter than one (T + 1 tokens)."""
        num_tokens, sequence_length = len(stream.tokens_S), schedule.sequence_length
        if num_tokens < sequence_length + 1:
            row = f"data.sequence_length={sequence_length} needs {sequence_length + 1}"
            problem = f"the training text has {num_tokens} tokens, and one row of {row}"
            right = f"data.sequence_length={num_tokens - 1}, or more text, would work"
            raise DataError(f"{problem}; {right}.")
        self._tokens_S, self._seed = stream.tokens_S, seed
        self._schedule, self.shape = schedule, schedule.shape
        self.rows_per_epoch = num_tokens // sequence_length
        self._rows = (
            grain.MapDataset.range(self.rows_per_epoch)
            .seed(seed)
            .shuffle()
            .repeat(reseed_each_epoch=True)
            .map_with_index(self._row)
        )

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """Rows `rows` of the batch of `step`: tokens_BT and targets_BT (int32; targets are the next
        tokens), mask_BT (float32 ones)."""
        windows_RS = np.stack([self._rows[row] for row in self._schedule.long_rows(step, rows)])
        tokens_RT = np.ascontiguousarray(windows_RS[:, :-1])
        long = {
            "tokens_BT": tokens_RT,
            "targets_BT": np.ascontiguousarray(windows_RS[:, 1:]),
            "mask_BT": np.ones(tokens_RT.shape, np.float32),
        }
        return self._schedule.split(step, rows, long)

    def tokens_seen(self, step: int) -> dict[str, int]:
        """Tokens in all batches before `step`, as those of one dataset named text."""
        return {"text": self._schedule.first_row(step) * self._schedule.sequence_length}

    def _row(self, index: int, window: int) -> np.ndarray:
        """Row `index` of the endless sequence, which is window `window` of its epoch: T + 1 ids."""
        epoch = index // self.rows_per_epoch
        offset = np.random.default_rng((self._seed, epoch)).integers(len(self._tokens_S))
        start = offset + window * self._schedule.sequence_length
        indices = np.arange(start, start + self._schedule.sequence_length + 1)
        return self._tokens_S.take(indices, mode="wrap")


class StreamValidation:
    """The whole held-out stream, every token predicted exactly once, in order. An eos precedes the
    stream, as it does documents in training, so that its first token is predicted from something.
    Rows do not overlap: a row's first token is predicted from the one before it alone. The last
    batch is padded; mask_BT excludes the padding from the loss. num_tokens: tokens predicted (the
    eos of each document among them), the sum of all masks. num_bytes: UTF-8 bytes of the text, for
    `grok.data.stream_batches.bits_per_byte`."""

    def __init__(self, stream: TokenStream, *, sequence_length: int, batch_size: int) -> None:
        """Lays out `stream` in batches of B rows of T tokens; no stream is too short."""
        self.num_tokens, self.num_bytes = len(stream.tokens_S), stream.num_bytes
        self._stream, self._shape = stream, (batch_size, sequence_length)

    def __len__(self) -> int:
        return -(-self.num_tokens // (self._shape[0] * self._shape[1]))

    def __iter__(self) -> Iterator[Batch]:
        """Batches like those of `StreamBatches.batch`, with mask_BT 0 on padding."""
        size = self._shape[0] * self._shape[1]
        padded_S = np.full(len(self) * size + 1, self._stream.eos_id, np.int32)
        padded_S[1 : self.num_tokens + 1] = self._stream.tokens_S
        for start in range(0, len(self) * size, size):
            indices = np.arange(start, start + size)
            yield {
                "tokens_BT": padded_S[indices].reshape(self._shape),
                "targets_BT": padded_S[indices + 1].reshape(self._shape),
                "mask_BT": (indices < self.num_tokens).astype(np.float32).reshape(self._shape),
            }
