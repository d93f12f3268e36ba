"""Records of a dataset's shards at gs://, by range reads: the documents of a batch are requested at
once, over several connections, and stay in a file of bounded size on this machine's disk, so that a
later epoch, or validation pass, of a dataset that fits there reads it once."""

import collections
import os
import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from grok import storage
from grok.data.array_record import read_chunk, read_offsets
from grok.errors import DataError

CONNECTIONS = 32
REQUEST_BYTES = 1 << 23  # of one request for documents that follow each other


class RecordCache:
    """The newest records, by number, in a file of `limit` bytes at most, or of what the disk has
    room for; the oldest are overwritten. Safe to use from several threads."""

    def __init__(self, limit: int) -> None:
        self._limit, self._end = limit, 0
        self._descriptor, path = tempfile.mkstemp(prefix="grok-records-")
        os.unlink(path)
        weakref.finalize(self, os.close, self._descriptor)
        # Oldest first: where each begins in the file, and its size.
        self._places: collections.OrderedDict[int, tuple[int, int]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def get(self, number: int) -> bytes | None:
        """The record, if it is still there."""
        with self._lock:
            if (place := self._places.get(number)) is None:
                return None
            return os.pread(self._descriptor, place[1], place[0])

    def put(self, number: int, record: bytes) -> None:
        """Keeps a record, in the place of the oldest ones."""
        size = len(record)
        with self._lock:
            if size > self._limit or number in self._places:
                return
            if self._end + size > self._limit:
                self._evict(self._end, self._limit)
                self._end = 0
            self._evict(self._end, self._end + size)
            if not self._write(record):
                # The disk is full: what the file has by now is its size, to be filled anew.
                self._places.clear()
                self._limit, self._end = self._end, 0
                return
            self._places[number] = (self._end, size)
            self._end += size

    def _write(self, record: bytes) -> bool:
        try:
            return os.pwrite(self._descriptor, record, self._end) == len(record)
        except OSError:
            return False

    def _evict(self, begin: int, end: int) -> None:
        """Forgets the oldest records while they are in these bytes of the file."""
        while self._places:
            number, (start, size) = next(iter(self._places.items()))
            if start >= end or start + size <= begin:
                return
            del self._places[number]


class RemoteRecords:
    """The records of all shards of a dataset at gs://, numbered through."""

    def __init__(self, folder: str, shards: Sequence[Mapping[str, Any]], cache_bytes: int) -> None:
        """shards: of the manifest; cache_bytes: of the disk to use."""
        self._folder, self._shards = folder, shards
        self._starts = np.cumsum([0, *(shard["documents"] for shard in shards)])
        self._cache = RecordCache(cache_bytes)
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="grok-records")
        self._offsets: dict[int, np.ndarray] = {}

    def fetch(self, numbers: Iterable[int]) -> None:
        """Requests these records, all at once. DataError where a shard is missing or damaged."""
        if not (missing := sorted({n for n in numbers if n not in self._cache})):
            return
        shards = np.unique(np.searchsorted(self._starts, missing, side="right") - 1)
        list(self._pool.map(self._offsets_of, map(int, shards)))

        def keep(run: range) -> None:
            self._fetch_run(run)  # in the cache alone: all of them may not fit in memory

        list(self._pool.map(keep, self._runs(missing)))

    def read(self, number: int) -> bytes:
        """One record, which is best requested before. DataError like `fetch`."""
        record = self._cache.get(number)
        return self._fetch_run(range(number, number + 1))[0] if record is None else record

    def _runs(self, numbers: Sequence[int]) -> Iterator[range]:
        """Yields ranges of records, each of one shard and a request."""
        first = None
        for number, following in zip(numbers, [*numbers[1:], -1], strict=True):
            first = number if first is None else first
            shard = self._shard_of(first)
            offsets = self._offsets_of(shard)
            size = offsets[number + 1 - self._starts[shard]] - offsets[first - self._starts[shard]]
            is_last = following != number + 1 or following == self._starts[shard + 1]
            if is_last or size >= REQUEST_BYTES:
                yield range(first, number + 1)
                first = None

    def _fetch_run(self, run: range) -> list[bytes]:
        """Records that follow each other in a shard, which go to the cache, too."""
        shard = self._shard_of(run.start)
        first = run.start - int(self._starts[shard])
        begins = self._offsets_of(shard)[first : first + len(run) + 1]
        base = int(begins[0])
        data = self._read(shard, base, int(begins[-1]))
        try:
            chunks = [read_chunk(data, base, int(begin)) for begin in begins[:-1]]
            records = [record for (record,) in chunks]
        except ValueError as error:
            raise self._damaged(shard, error) from None
        for number, record in zip(run, records, strict=True):
            self._cache.put(number, record)
        return records

    def _offsets_of(self, shard: int) -> np.ndarray:
        """Offsets of the records of a shard in its file; read at the first use."""
        if (offsets := self._offsets.get(shard)) is None:
            size, count = (self._shards[shard][key] for key in ("bytes", "documents"))
            try:
                offsets = read_offsets(size, lambda begin, end: self._read(shard, begin, end))
                if len(offsets) != count + 1:
                    raise ValueError(f"it has {len(offsets) - 1} documents")
            except DataError:
                raise  # it is a ValueError, too
            except ValueError as error:
                raise self._damaged(shard, error) from None
            # Two threads may both read it.
            offsets = self._offsets.setdefault(shard, offsets)
        return offsets

    def _read(self, shard: int, begin: int, end: int) -> bytes:
        path = storage.join(self._folder, self._shards[shard]["name"])
        out = bytearray(end - begin)
        storage.read_ranges(path, [begin], memoryview(out), DataError)
        return bytes(out)

    def _shard_of(self, number: int) -> int:
        return int(np.searchsorted(self._starts, number, side="right")) - 1

    def _damaged(self, shard: int, error: Exception) -> DataError:
        path = storage.join(self._folder, self._shards[shard]["name"])
        check = "`grok data inspect --check` compares all files with the manifest"
        return DataError(f"shard {path} is damaged ({error}); {check}.")
