"""Packed batches of a mixture of token datasets, each a pure function of (data, seed, step).
B rows of a batch, T tokens of a row, N documents, S tokens of a document."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from grok.data.batch_schedule import Batch, BatchSchedule, Mixture
from grok.data.dataset import Document, TokenDataset
from grok.data.packing import PACKERS, ConcatThenSplit, DocumentSlice, RowPacker
from grok.errors import DataError

# Documents of a dataset in memory: one that fills several rows is read once for all of them.
CACHED_DOCUMENTS = 64
# Rows of a dataset by which is judged whether its rows bear loss.
SAMPLED_ROWS = 64
# Documents fetched at a time where all are read in order.
PREFETCHED_DOCUMENTS = 4096


class PackedBatches:
    """Training batches by step number, without end. Row r of the run, which
    `grok.data.batch_schedule` assigns to a step, is the next row of the dataset that the mixture
    assigns to r. A dataset's rows follow `grok.data.packing`."""

    def __init__(
        self,
        datasets: Mapping[str, TokenDataset],
        mixture: Mixture,
        schedule: BatchSchedule,
        *,
        seed: int,
        packing: str = "concat_then_split",
    ) -> None:
        """Packs `datasets`, in the order of the mixture's weights, in rows for `schedule`.
        DataError when a dataset has no row: no documents, or none of two tokens for "best_fit"."""
        self._mixture, self._schedule, self.shape = mixture, schedule, schedule.shape
        length = schedule.sequence_length
        self._packers: dict[str, RowPacker] = {
            name: PACKERS[packing](documents.lengths, length, f"{seed}/{documents.hash}")
            for name, documents in datasets.items()
        }
        self._datasets = datasets
        self._read = {name: _reader(documents) for name, documents in datasets.items()}
        self._names = list(datasets)
        for name, packer in self._packers.items():
            if not packer.rows_per_epoch:
                problem = f"dataset {name} has no document with a token to predict"
                raise DataError(f"{problem}; one with text would work.")

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """Rows `rows` of the batch of `step`, [B, T] each. tokens_BT and targets_BT: int32; targets
        are the next tokens. segment_ids_BT: int32, from 1 in each row, one for each slice of a
        document, 0 where there is padding. positions_BT: int32, from 0 in each segment, so that
        none is ever beyond the row's length. mask_BT: float32, 0 where there is no target in the
        same document or its own mask says no loss."""
        locations = [self._mixture.locate(row) for row in self._schedule.long_rows(step, rows)]
        batch = empty_batch(len(locations), self._schedule.sequence_length)
        names = [self._names[dataset] for dataset, _ in locations]
        slices = [
            self._packers[name].slices(number)
            for name, (_, number) in zip(names, locations, strict=True)
        ]
        for name in dict.fromkeys(names):
            of_name = [row for row, other in zip(slices, names, strict=True) if other == name]
            self._datasets[name].prefetch(_documents(of_name))
        for row, name in enumerate(names):
            fill_row(batch, row, slices[row], self._read[name])
        return self._schedule.split(step, rows, batch)

    def share_without_loss(self, name: str) -> float:
        """Share of a dataset's rows, by a sample over its first epoch, that train nothing: none of
        their tokens bears loss."""
        packer, length = self._packers[name], self._schedule.sequence_length
        count = min(SAMPLED_ROWS, packer.rows_per_epoch)
        slices = [packer.slices(row * packer.rows_per_epoch // count) for row in range(count)]
        self._datasets[name].prefetch(_documents(slices))
        batch = empty_batch(count, length)
        for row, documents in enumerate(slices):
            fill_row(batch, row, documents, self._read[name])
        return 1 - float(batch["mask_BT"].any(axis=1).mean())

    def tokens_seen(self, step: int) -> dict[str, int]:
        """Tokens of each dataset, without padding, in all batches before `step`."""
        counts = self._mixture.counts(self._schedule.first_row(step))
        return {
            name: packer.tokens_before(count)
            for (name, packer), count in zip(self._packers.items(), counts, strict=True)
        }


class PackedValidation:
    """All documents of a dataset end to end, in their own order, each token but a document's first
    predicted once. The last batch is filled up with rows of padding."""

    def __init__(self, documents: TokenDataset, *, sequence_length: int, batch_size: int) -> None:
        self._documents, self._read = documents, _reader(documents)
        self._packer = ConcatThenSplit(documents.lengths, sequence_length, key=None)
        self._shape = batch_size, sequence_length

    def __iter__(self) -> Iterator[Batch]:
        """Batches like those of `PackedBatches.batch`."""
        num_rows, batch_size = self._packer.rows_per_epoch, self._shape[0]
        for first in range(0, num_rows, batch_size):
            batch = empty_batch(*self._shape)
            last = min(first + batch_size, num_rows)
            slices = [self._packer.slices(number) for number in range(first, last)]
            self._documents.prefetch(_documents(slices))
            for row, documents in enumerate(slices):
                fill_row(batch, row, documents, self._read)
            yield batch

    def num_bytes(self, bytes_V: np.ndarray, first_bytes_V: np.ndarray | None = None) -> int:
        """UTF-8 bytes of the tokens that are predicted, where token v has `bytes_V[v]`, or, given
        that documents begin with bos, `first_bytes_V[v]` behind it.
        `StreamValidation.num_bytes` counts the bytes of a text's first token too, since there it is
        predicted from an eos. Reads every document once."""
        total = 0
        for index in range(len(self._documents.lengths)):
            if index % PREFETCHED_DOCUMENTS == 0:
                last = min(index + PREFETCHED_DOCUMENTS, len(self._documents.lengths))
                self._documents.prefetch(range(index, last))
            document = self._documents[index]
            bytes_S = bytes_V[document.tokens_S]
            if first_bytes_V is not None:
                bytes_S[1:2] = first_bytes_V[document.tokens_S[1:2]]
            if document.mask_S is not None:
                bytes_S = bytes_S * document.mask_S
            total += int(bytes_S[1:].sum())
        return total


def _reader(documents: TokenDataset) -> Callable[[int], Document]:
    return functools.lru_cache(maxsize=CACHED_DOCUMENTS)(documents.__getitem__)


def _documents(rows: Sequence[Sequence[DocumentSlice]]) -> set[int]:
    """The numbers of the documents that rows have slices of."""
    return {number for slices in rows for number, _, _ in slices}


def empty_batch(num_rows: int, sequence_length: int) -> Batch:
    """Rows of padding."""
    shape = (num_rows, sequence_length)
    ids = ("tokens_BT", "targets_BT", "segment_ids_BT", "positions_BT")
    batch: Batch = {name: np.zeros(shape, np.int32) for name in ids}
    return batch | {"mask_BT": np.zeros(shape, np.float32)}


def fill_row(
    batch: Batch, row: int, slices: Sequence[DocumentSlice], read: Callable[[int], Document]
) -> None:
    """Writes slices of documents into one row of a batch, one after the other."""
    tokens_T, targets_T, segments_T, positions_T, mask_T = (array[row] for array in batch.values())
    begin = 0
    for segment, (number, start, size) in enumerate(slices, start=1):
        document = read(number)
        end, outputs = begin + size, slice(start + 1, start + size + 1)
        targets_S = document.tokens_S[outputs]
        # A slice that ends with its document has one target less: the next token is another's.
        predicted = slice(begin, begin + len(targets_S))
        tokens_T[begin:end] = document.tokens_S[start : start + size]
        targets_T[predicted] = targets_S
        segments_T[begin:end] = segment
        positions_T[begin:end] = np.arange(size)
        mask_T[predicted] = 1 if document.mask_S is None else document.mask_S[outputs]
        begin = end
