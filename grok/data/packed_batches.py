"""Packed batches of a mixture of prepared datasets, each a pure function of its step.

The position in the data is the step number and nothing else has to be saved to resume. A host
makes only the rows that it is asked for.

B rows of a batch, T tokens of a row, N documents, S tokens of a document.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from grok.data.batch_schedule import Batch, BatchSchedule
from grok.data.dataset import Document
from grok.data.mixture import Mixture
from grok.data.packing import ConcatThenSplit, DocumentSlice, make_packer
from grok.errors import DataError

# Documents of a dataset kept in memory: one that fills many rows is read once for its neighbours.
CACHED_DOCUMENTS = 64


class DocumentSource(Protocol):
    """What is needed of a dataset; `grok.data.dataset.Prepared` is one."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every document."""

    @property
    def hash(self) -> str:
        """Name of the content."""

    def __getitem__(self, index: int) -> Document:
        """A document by its number."""


class PackedBatches:
    """Training batches by step number, without end.

    Row r of the run (`grok.data.batch_schedule` says which step it is of) is the next row of the
    dataset that the mixture gives it to. A dataset's rows follow `grok.data.packing`: every epoch
    in a new random order.
    """

    def __init__(
        self,
        datasets: Mapping[str, DocumentSource],
        mixture: Mixture,
        shapes: BatchSchedule,
        *,
        seed: int,
        packing: str = "concat_then_split",
    ) -> None:
        """Lay out `datasets`, which the mixture knows by their order here, in rows for `shapes`.

        DataError when a dataset has no row: no documents, or none of two tokens for "best_fit".
        """
        self._names = list(datasets)
        self._mixture = mixture
        self._shapes = shapes
        self.shape = shapes.shape
        length = shapes.sequence_length
        self._layouts = [
            make_packer(packing, documents.lengths, length, f"{seed}/{documents.hash}")
            for documents in datasets.values()
        ]
        self._read = [
            functools.lru_cache(maxsize=CACHED_DOCUMENTS)(documents.__getitem__)
            for documents in datasets.values()
        ]
        for name, layout in zip(self._names, self._layouts, strict=True):
            if not layout.rows_per_epoch:
                raise DataError(
                    f"dataset {name} has no document with a token to predict; one with text would "
                    "work."
                )

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """Rows `rows` of the batch of `step`, [B, T] each.

        tokens_BT and targets_BT: int32; targets are the next tokens. segment_ids_BT: int32, from 1
        in each row, one for each piece of a document, 0 where there is padding. positions_BT:
        int32, from 0 in each segment, so that none is ever beyond the row's length. mask_BT:
        float32, 0 where there is no target in the same document or its own mask says no loss.
        """
        places = [self._mixture.locate(row) for row in self._shapes.rows(step, rows)]
        batch = empty_batch(len(places), self._shapes.sequence_length)
        for row, (dataset, number) in enumerate(places):
            fill_row(batch, row, self._layouts[dataset].pieces(number), self._read[dataset])
        return self._shapes.cut(step, rows, batch)

    def tokens_seen(self, step: int) -> dict[str, int]:
        """Tokens of each dataset, without padding, in all batches before `step`."""
        counts = self._mixture.counts(self._shapes.first_row(step))
        return {
            name: layout.tokens_before(count)
            for name, layout, count in zip(self._names, self._layouts, counts, strict=True)
        }


class PackedValidation:
    """All documents of a dataset end to end, in their own order, each token but a document's first
    predicted once. The last batch is filled with rows of padding."""

    def __init__(self, documents: DocumentSource, *, sequence_length: int, batch_size: int) -> None:
        """Lay out `documents` in batches of B rows of T tokens."""
        self._documents = documents
        self._layout = ConcatThenSplit(documents.lengths, sequence_length, key=None)
        self._read = functools.lru_cache(maxsize=CACHED_DOCUMENTS)(documents.__getitem__)
        self._sequence_length = sequence_length
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[Batch]:
        """Batches like those of `PackedBatches.batch`."""
        num_rows = self._layout.rows_per_epoch
        for first in range(0, num_rows, self._batch_size):
            batch = empty_batch(self._batch_size, self._sequence_length)
            for row in range(min(self._batch_size, num_rows - first)):
                fill_row(batch, row, self._layout.pieces(first + row), self._read)
            yield batch

    def num_bytes(self, bytes_V: np.ndarray) -> int:
        """UTF-8 bytes of what is predicted, where token v stands for `bytes_V[v]` of them.

        A text file's validation counts the same: there the first token is predicted too, from the
        eos before it, and its bytes are among the text's. Reads every document once.
        """
        total = 0
        for index in range(len(self._documents.lengths)):
            document = self._documents[index]
            bytes_S = bytes_V[document.tokens_S]
            if document.mask_S is not None:
                bytes_S = bytes_S * document.mask_S
            total += int(bytes_S[1:].sum())
        return total


def empty_batch(num_rows: int, sequence_length: int) -> Batch:
    """Rows of padding."""
    shape = (num_rows, sequence_length)
    ids = ("tokens_BT", "targets_BT", "segment_ids_BT", "positions_BT")
    return {name: np.zeros(shape, np.int32) for name in ids} | {
        "mask_BT": np.zeros(shape, np.float32)
    }


def fill_row(
    batch: Batch, row: int, pieces: Sequence[DocumentSlice], read: Callable[[int], Document]
) -> None:
    """Write the pieces of documents into one row of a batch, one after the other."""
    tokens_T, targets_T, segments_T, positions_T, mask_T = (array[row] for array in batch.values())
    begin = 0
    for segment, piece in enumerate(pieces, start=1):
        document = read(piece.document)
        end = begin + piece.size
        inputs = slice(piece.start, piece.start + piece.size)
        outputs = slice(inputs.start + 1, inputs.stop + 1)
        targets_S = document.tokens_S[outputs]
        # A piece that ends with its document has one target less: what follows is another's.
        predicted = slice(begin, begin + len(targets_S))
        tokens_T[begin:end] = document.tokens_S[inputs]
        targets_T[predicted] = targets_S
        segments_T[begin:end] = segment
        positions_T[begin:end] = np.arange(piece.size)
        mask_T[predicted] = 1 if document.mask_S is None else document.mask_S[outputs]
        begin = end
