"""Token datasets: documents as records of tokens in ArrayRecord shards, with random access. `grok
data prepare` writes the folder: `manifest.json`, the shards that it names, `lengths.npy` (tokens of
every document, in order), `sources.jsonl` (every file that was read, with its SHA-256), the
tokenizer, and `rejected.jsonl` where records were bad. A record is little-endian: uint32 S, uint8
flags (bit 0: has a loss mask), S uint32 tokens, S uint8 of mask if it has one, and the document's
metadata as JSON. S tokens of a document, N documents."""

import dataclasses
import hashlib
import io
import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from grok import storage
from grok.data.manifest import FORMAT, MANIFEST_FILE, read_manifest
from grok.data.remote_records import RemoteRecords
from grok.errors import DataError
from grok.storage import StrPath

HAS_MASK = 1
_HEADER = struct.Struct("<IB")

CACHE_BYTES = 16 << 30
LENGTHS_FILE = "lengths.npy"
COMPARE = "`grok data inspect --check` compares all files with the manifest."


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """One document."""

    tokens_S: np.ndarray  # int32
    mask_S: np.ndarray | None  # uint8, 1 where a token bears loss; None: all do
    metadata: Mapping[str, Any]  # id, language, licence and source (number in the manifest)


def encode_document(
    tokens_S: np.ndarray, mask_S: np.ndarray | None, metadata: Mapping[str, Any]
) -> bytes:
    """The record of a document; its tokens and mask may be of any integer type."""
    header = _HEADER.pack(len(tokens_S), HAS_MASK if mask_S is not None else 0)
    tokens = np.asarray(tokens_S).astype("<u4", copy=False).tobytes()
    mask = b"" if mask_S is None else np.asarray(mask_S).astype("u1", copy=False).tobytes()
    text = json.dumps(metadata, ensure_ascii=False, separators=(",", ":"))
    return header + tokens + mask + text.encode()


def decode_document(record: bytes) -> Document:
    """The document of a record; DataError where the bytes are no record."""
    try:
        length, flags = _HEADER.unpack_from(record)
        tokens_S = np.frombuffer(record, "<u4", length, _HEADER.size).astype(np.int32)
        end, mask_S = _HEADER.size + 4 * length, None
        if flags & HAS_MASK:
            mask_S = np.frombuffer(record, np.uint8, length, end)
            end += length
        return Document(tokens_S, mask_S, json.loads(record[end:]))
    except (struct.error, ValueError):
        problem = f"a record of {len(record)} bytes is no document of `{FORMAT}`"
        right = "a folder that `grok data prepare` wrote would work"
        raise DataError(f"{problem}; {right}.") from None


class TokenDataset:
    """The documents of a dataset by number, here or at gs://; safe to read from several threads."""

    def __init__(self, folder: str | Path, cache_bytes: int = CACHE_BYTES) -> None:
        """Opens a folder that `grok data prepare` wrote; DataError when a file is damaged. Of one
        at gs://, documents are kept in `cache_bytes` of this machine's disk."""
        self.folder: StrPath = folder if storage.is_remote(folder) else Path(folder)
        self._cache_bytes = cache_bytes
        self.manifest = read_manifest(self.folder)
        canonical = json.dumps(self.manifest, sort_keys=True, separators=(",", ":"))
        self.hash = hashlib.sha256(canonical.encode()).hexdigest()  # depends on all files
        self.lengths = self._read_lengths()  # tokens of each document, uint32 (N,)
        counts = [shard["documents"] for shard in self.manifest["shards"]]
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._readers: dict[int, Any] = {}
        self._remote: RemoteRecords | None = None
        if storage.is_remote(folder):
            shards = self.manifest["shards"]
            self._remote = RemoteRecords(str(folder), shards, cache_bytes)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Document:
        """Document `index`; DataError where its shard is missing or damaged."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        record = self._read_local(index) if self._remote is None else self._remote.read(index)
        document = decode_document(record)
        if len(document.tokens_S) != self.lengths[index]:
            length = f"{self.lengths[index]} tokens, and its record has {len(document.tokens_S)}"
            problem = (
                f"{storage.join(self.folder, LENGTHS_FILE)} says that document {index} has {length}"
            )
            raise DataError(f"{problem}; {COMPARE}")
        return document

    def prefetch(self, indices: Iterable[int]) -> None:
        """Fetches documents at gs://, all at once, that are read soon; nothing where they are on
        this machine. DataError where a shard is missing or damaged."""
        if self._remote is not None:
            self._remote.fetch(indices)

    def _read_local(self, index: int) -> bytes:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        if (reader := self._readers.get(shard)) is None:
            # Two threads may both open a shard; one of the readers is then dropped.
            reader = self._readers.setdefault(shard, self._open_shard(shard))
        try:
            return reader.read([int(index - self._starts[shard])])[0]
        except (RuntimeError, ValueError, IndexError) as error:
            raise self._damaged(shard, error) from None

    def __reduce__(self) -> tuple[type, tuple[StrPath, int]]:
        """Pickled as its folder: each process opens its own readers."""
        return TokenDataset, (self.folder, self._cache_bytes)

    def _read_lengths(self) -> np.ndarray:
        path = storage.join(self.folder, LENGTHS_FILE)
        try:
            lengths_N = np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            message = f"{path} cannot be read ({error}); `grok data prepare` writes it."
            raise DataError(message) from None
        documents = self.manifest["counts"]["documents"]
        if lengths_N.shape != (documents,) or lengths_N.dtype != np.uint32:
            manifest = f"{MANIFEST_FILE} has {documents} (uint32)"
            problem = f"{path} has {lengths_N.size} documents ({lengths_N.dtype}) and {manifest}"
            raise DataError(f"{problem}; the folder as `grok data prepare` wrote it would work.")
        return lengths_N

    def _open_shard(self, shard: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        path = Path(self.folder) / self.manifest["shards"][shard]["name"]
        if not path.exists():
            raise DataError(f"shard {path} is missing, and {MANIFEST_FILE} names it.")
        try:
            # Records are read one by one, in any order: reading ahead would be wasted.
            options = {"file_reader_buffer_size": 1 << 15}
            reader = ArrayRecordReader(str(path), "readahead_buffer_size:0", **options)
            count = reader.num_records()
        except (RuntimeError, ValueError) as error:
            raise self._damaged(shard, error) from None
        if count != self._starts[shard + 1] - self._starts[shard]:
            raise self._damaged(shard, f"it has {count} documents")
        return reader

    def _damaged(self, shard: int, reason: object) -> DataError:
        name = self.manifest["shards"][shard]["name"]
        first_line = str(reason).strip().split("\n")[0][:200]
        return DataError(
            f"shard {storage.join(self.folder, name)} is damaged ({first_line}); {COMPARE}"
        )
