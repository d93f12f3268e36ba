"""Packing documents into rows of T tokens. A packer is a pure function of the lengths of N
documents and a key (seed and data), so that any of the R rows of any epoch is found without those
before it. Each slice of a document is a segment of its row."""

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

# The current epoch, the one before, whose end may be in the same batch, and the next.
MAX_EPOCHS = 3


class EpochCache[Value]:
    """Values of `compute` by epoch, each computed once; safe to use from several threads."""

    def __init__(self, compute: Callable[[int], Value]) -> None:
        self._compute = compute
        self._values: dict[int, Future[Value]] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, "epoch")

    def get(self, epoch: int, progress: float) -> Value:
        """The value of `epoch`, of which a share of `progress` is over; from the middle on, the
        next epoch's is computed in the background."""
        with self._lock:
            value = self._start(epoch)
            if progress >= 0.5:
                self._start(epoch + 1)
        return value.result()

    def _start(self, epoch: int) -> Future[Value]:
        value = self._values.pop(epoch, None) or self._pool.submit(self._compute, epoch)
        self._values[epoch] = value
        if len(self._values) > MAX_EPOCHS:
            del self._values[next(iter(self._values))]
        return value


class DocumentSlice(NamedTuple):
    """`size` inputs of a document from its token `start` on; the targets are the next tokens, as
    far as the document has them."""

    document: int
    start: int
    size: int


def permutation(count: int, *key: object) -> np.ndarray:
    """A random permutation of `count` indices by `key`: int64 (count,). Sorts the raw words of a
    counter-based generator, without as many low bits as an index takes. Both are fixed for good,
    whereas NumPy may change its shuffle from version to version."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)
    return stable_argsort(words >> np.uint64(count.bit_length()))


def stable_argsort(values_N: np.ndarray) -> np.ndarray:
    """The stable argsort of integers from 0 to 2**64 / 2**(bits of N): int64 (N,). Sorts the values
    with their indices in the low bits, in a fraction of argsort's time."""
    bits = np.uint64(len(values_N).bit_length())
    keys_N = values_N.astype(np.uint64) << bits
    keys_N |= np.arange(len(values_N), dtype=np.uint64)
    keys_N.sort()
    keys_N &= (np.uint64(1) << bits) - np.uint64(1)
    return keys_N.view(np.int64)


class ConcatThenSplit:
    """All documents of an epoch end to end in a new random order, split every T tokens. A document
    that does not fit continues in the next row, whose first target was the last of the row before:
    every token but a document's first is predicted exactly once an epoch. Only the last row of an
    epoch has padding."""

    def __init__(self, lengths_N: np.ndarray, sequence_length: int, key: str | None) -> None:
        """Packs documents of `lengths_N` tokens in rows of T; without a key, in their order."""
        self._lengths_N = lengths_N.astype(np.int64)
        self._sequence_length, self._key = sequence_length, key
        self._num_tokens = int(self._lengths_N.sum())
        self.rows_per_epoch = -(-self._num_tokens // sequence_length)
        self._orders = EpochCache(self._order)

    def slices(self, row: int) -> list[DocumentSlice]:
        """Content of row `row`, counted over all epochs; the rest of the row is padding."""
        epoch, row = divmod(row, self.rows_per_epoch)
        order_N, ends_N = self._orders.get(epoch, row / self.rows_per_epoch)
        position = row * self._sequence_length
        stop = min(position + self._sequence_length, self._num_tokens)
        first = np.searchsorted(ends_N, position, side="right")
        slices, inside = [], slice(first, np.searchsorted(ends_N, stop, side="left") + 1)
        for document, end in zip(order_N[inside].tolist(), ends_N[inside].tolist(), strict=True):
            if size := min(end, stop) - position:
                start = position - (end - int(self._lengths_N[document]))
                slices.append(DocumentSlice(document, start, size))
            position += size
        return slices

    def tokens_before(self, row: int) -> int:
        """Inputs of all rows before row `row`, counted over all epochs."""
        epoch, row = divmod(row, self.rows_per_epoch)
        return epoch * self._num_tokens + row * self._sequence_length

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents in the order of an epoch, and the token after the end of each."""
        count, key = len(self._lengths_N), self._key
        order_N = np.arange(count) if key is None else permutation(count, key, epoch)
        return order_N, np.cumsum(self._lengths_N[order_N])


class BestFit:
    """Whole documents only: a document longer than T + 1 tokens is truncated. A document of n
    tokens takes n - 1 positions, since its last token predicts nothing. The documents of a row are
    chosen once; every epoch has the same rows in a new random order, so that all epochs have
    equally many rows."""

    def __init__(self, lengths_N: np.ndarray, sequence_length: int, key: str) -> None:
        self._sizes_N = np.clip(lengths_N.astype(np.int64) - 1, 0, sequence_length)
        shuffled_N = permutation(len(lengths_N), key, "rows")
        row_N = best_fit_decreasing(self._sizes_N[shuffled_N], sequence_length)
        self._key = key
        self.rows_per_epoch = int(row_N.max(initial=-1)) + 1
        # Documents by row; those in no row (-1) come first and are left out.
        self._documents_N = shuffled_N[stable_argsort(row_N + 1)]
        self._starts_R = np.cumsum(np.bincount(row_N + 1, minlength=self.rows_per_epoch + 1))
        before_N = np.concatenate([[0], np.cumsum(self._sizes_N[self._documents_N])])
        self._tokens_R = np.diff(before_N[self._starts_R])
        self._orders = EpochCache(self._order)

    def slices(self, row: int) -> list[DocumentSlice]:
        """Content of row `row`, counted over all epochs; the rest of the row is padding."""
        epoch, row = divmod(row, self.rows_per_epoch)
        row = self._orders.get(epoch, row / self.rows_per_epoch)[0][row]
        documents = self._documents_N[self._starts_R[row] : self._starts_R[row + 1]]
        return [DocumentSlice(int(d), 0, int(self._sizes_N[d])) for d in documents]

    def tokens_before(self, row: int) -> int:
        """Inputs, without padding, of all rows before row `row`, counted over all epochs."""
        epoch, row = divmod(row, self.rows_per_epoch)
        return epoch * int(self._tokens_R.sum()) + int(self._orders.get(epoch, 0)[1][row])

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows in the order of an epoch, and the tokens before each."""
        order_R = permutation(self.rows_per_epoch, self._key, epoch)
        tokens_R = self._tokens_R[order_R]
        return order_R, np.cumsum(tokens_R) - tokens_R


RowPacker = ConcatThenSplit | BestFit
PACKERS: dict[str, type[ConcatThenSplit] | type[BestFit]] = {
    "concat_then_split": ConcatThenSplit,
    "best_fit": BestFit,
}


def packing_efficiency(packer: RowPacker, sequence_length: int) -> float:
    """Share of the positions of an epoch's rows that hold a token."""
    rows = packer.rows_per_epoch
    return packer.tokens_before(rows) / (rows * sequence_length)


def best_fit_decreasing(sizes_N: np.ndarray, capacity: int) -> np.ndarray:
    """Row of each of N items of `sizes_N` (0 to `capacity`), int64 (N,); -1 where the size is 0.
    The largest first, each into the fullest row that still has room (Johnson, "Near-optimal bin
    packing algorithms", 1973). Items of one size are placed together, as many at a time as there
    are rows equally full."""
    row_N = np.full(len(sizes_N), -1, np.int64)
    num_rows = 0
    # Rows by the room that they have, as chunks of arrays.
    rows_with: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]
    num_with = np.zeros(capacity + 1, np.int64)

    def add(room: int, rows: np.ndarray) -> None:
        if len(rows):
            rows_with[room].append(rows)
            num_with[room] += len(rows)

    by_size_N = stable_argsort(capacity - sizes_N)
    num_of = np.bincount(sizes_N, minlength=1)
    sizes = np.flatnonzero(num_of)[::-1]
    ends = np.cumsum(num_of[sizes])
    for size, end, count in zip(sizes.tolist(), ends.tolist(), num_of[sizes], strict=True):
        unplaced = by_size_N[end - count : end] if size else by_size_N[:0]
        while len(unplaced):
            fitting = np.flatnonzero(num_with[size:])
            if not len(fitting):
                needed = -(-len(unplaced) // (capacity // size))
                add(capacity, np.arange(num_rows, num_rows + needed))
                num_rows += needed
                continue
            room = size + int(fitting[0])
            rows = rows_with[room].pop()
            num_with[room] -= len(rows)
            placed = min(len(rows), len(unplaced))
            row_N[unplaced[:placed]] = rows[:placed]
            add(room - size, rows[:placed])
            add(room, rows[placed:])
            unplaced = unplaced[placed:]
    return row_N
