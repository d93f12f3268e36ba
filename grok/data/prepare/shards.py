"""Shards of a dataset while they are written, the journal by which an interrupted job resumes, both
in a folder of their own until the dataset is complete, and the manifest that completes it."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from grok import storage
from grok.data.dataset import LENGTHS_FILE
from grok.data.manifest import FORMAT, MANIFEST_FILE, read_manifest
from grok.data.prepare.records import EncodedDocument
from grok.data.prepare.sources import SourceFile
from grok.errors import DataError
from grok.resumable import Journal
from grok.storage import StrPath

# Records are read one by one, and their bytes must not depend on a compressor's version.
WRITER_OPTIONS = "group_size:1,uncompressed"
COUNTS = (
    *("documents", "bytes", "tokens", "loss_tokens", "rejected", "duplicates"),
    *("repeated_ids", "lost_bytes"),  # documents with an earlier one's id; bytes of bad files
)


@dataclasses.dataclass(kw_only=True)
class ShardEntry:
    """Journal entry of a shard and of the input up to its end."""

    sha256: str = ""  # of its file, which an entry without documents lacks
    bytes: int = 0
    position: tuple[int, int] = (0, 0)  # file, and record in it, that come next
    is_last: bool = False  # no input is left
    lengths: list[int] = dataclasses.field(default_factory=list)  # tokens of each document
    digests: list[str] = dataclasses.field(default_factory=list)  # of texts, in hexadecimal
    ids: list[str] = dataclasses.field(default_factory=list)  # digests of ids, in hexadecimal
    counts: dict[int, dict[str, int]] = dataclasses.field(default_factory=dict)  # by source
    rejected: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # bad records

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ShardEntry":
        """The entry of a line of the journal."""
        counts = {int(source): counts for source, counts in data["counts"].items()}
        return cls(**{**data, "counts": counts, "position": tuple(data["position"])})

    def add_id(self, digest: str, ids: set[str]) -> int:
        """Notes a document's id, also in `ids`, those of all before; returns 1 if it is there."""
        is_repeated = digest in ids
        if not is_repeated:
            ids.add(digest)
            self.ids.append(digest)
        return int(is_repeated)

    def add(self, source: int, **numbers: int) -> None:
        """Adds to the counts of a source."""
        counts = self.counts.setdefault(source, dict.fromkeys(COUNTS, 0))
        for name, number in numbers.items():
            counts[name] += number


class ShardJournal(contextlib.ExitStack):
    """The finished shards of an unfinished dataset; raises DataError as `Journal` does."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        super().__init__()
        self.folder = folder
        journal = Journal(folder / "journal.jsonl", identity, DataError, sync=True)
        self._journal = self.enter_context(journal)
        self.entries = [ShardEntry.from_json(entry) for entry in self._journal.entries]

    @property
    def is_complete(self) -> bool:
        """True when all input was read."""
        return bool(self.entries) and self.entries[-1].is_last

    @property
    def position(self) -> tuple[int, int]:
        """File, and record in it, that follow the finished shards."""
        return self.entries[-1].position if self.entries else (0, 0)

    def shard_path(self, number: int) -> Path:
        """Path of a finished shard until the dataset is complete."""
        return self.folder / f"{number:05}.arrayrecord"

    def append(self, entry: ShardEntry) -> None:
        """Records a shard as finished; its file must be in place."""
        self._journal.append(dataclasses.asdict(entry))
        self.entries.append(entry)


class ShardWriter:
    """Writes documents to the next shard of a journal; a full shard is finished before the next."""

    def __init__(self, journal: ShardJournal, shard_bytes: int) -> None:
        """Writes shards whose records have at most `shard_bytes` bytes, or are one record."""
        self._journal, self._shard_bytes = journal, shard_bytes
        self._unfinished = journal.folder / "unfinished.arrayrecord"
        self._writer: Any = None
        self._size = 0
        self.entry = ShardEntry(position=journal.position)

    def write(self, document: EncodedDocument, position: tuple[int, int]) -> None:
        """Writes the document at `position`, in the next shard where this one has no room."""
        if self._size and self._size + len(document.record) > self._shard_bytes:
            self.finish(position)
        if self._writer is None:
            self._writer = ArrayRecordWriter(str(self._unfinished), WRITER_OPTIONS)
        self._writer.write(document.record)
        self._size += len(document.record)
        self.entry.lengths.append(document.tokens)

    def finish(self, position: tuple[int, int], is_last: bool = False) -> None:
        """Closes the shard: all input before `position` is in it or in those before."""
        path = self._journal.shard_path(len(self._journal.entries))
        if self._writer is not None:
            try:
                self._writer.close()
            except RuntimeError as error:
                message = f"{self._unfinished} cannot be written: {str(error).partition(';')[0]}"
                raise DataError(f"{message}; with room the same command continues.") from None
            sync(self._unfinished)
            self.entry.sha256 = _file_hash(self._unfinished)
            self.entry.bytes = self._unfinished.stat().st_size
            os.replace(self._unfinished, path)
        self.entry.position, self.entry.is_last = position, is_last
        self._journal.append(self.entry)
        self._writer, self._size, self.entry = None, 0, ShardEntry(position=position)

    def abandon(self) -> None:
        """Closes the file of a shard that is not finished."""
        if self._writer is not None:
            with contextlib.suppress(RuntimeError):
                self._writer.close()


def _file_hash(path: StrPath) -> str:
    with storage.open_file(path, DataError) as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()


def sync(path: Path) -> None:
    """Waits until a file's bytes are on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


SOURCES_FILE = "sources.jsonl"
REJECTED_FILE = "rejected.jsonl"


def describe_sources(
    names: Sequence[str], files: Sequence[SourceFile], licence: str | None
) -> list[dict[str, Any]]:
    """Each source with its SHA-256: of a file, or of a folder's lines in SOURCES_FILE."""
    sources = []
    for number, name in enumerate(names):
        members = [file for file in files if file.source == number]
        is_file = len(members) == 1 and members[0].name == name
        lines_hash = hashlib.sha256(sources_lines(members)).hexdigest()
        source: dict[str, Any] = {
            "name": name,
            "sha256": members[0].sha256 if is_file else lines_hash,
            "files": len(members),
            "file_bytes": sum(file.bytes for file in members),
        }
        sources.append(source if licence is None else {**source, "licence": licence})
    return sources


def write_dataset(
    folder: Path,
    journal: ShardJournal,
    identity: Mapping[str, Any],
    files: Sequence[SourceFile],
    tokenizer: Mapping[str, bytes],
) -> dict[str, Any]:
    """Completes the dataset of a journal with all input, `tokenizer` being the contents of that
    one's files by name; returns its manifest. After an
    interruption it can be called again: the manifest is written last."""
    entries = journal.entries
    names = [f"shard-{n:05}-of-{len(entries):05}.arrayrecord" for n in range(len(entries))]
    for number, name in enumerate(names):
        if (path := journal.shard_path(number)).exists():
            os.replace(path, folder / name)
    lengths = io.BytesIO()
    np.save(lengths, np.concatenate([np.array(entry.lengths, np.uint32) for entry in entries]))
    contents = {LENGTHS_FILE: lengths.getvalue(), SOURCES_FILE: sources_lines(files)}
    contents |= {**tokenizer, REJECTED_FILE: rejected_lines(entries)}
    contents = {name: data for name, data in contents.items() if data}  # perhaps none is bad
    for name, data in contents.items():
        storage.write_bytes(folder / name, data)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    manifest = {
        "format": FORMAT,
        **identity,
        "sources": [
            {**source, "counts": sum_counts(entries, number)}
            for number, source in enumerate(identity["sources"])
        ],
        "counts": sum_counts(entries),
        "shards": [
            {
                "name": name,
                "sha256": entry.sha256,
                "bytes": entry.bytes,
                "documents": len(entry.lengths),
                "tokens": sum(entry.lengths),
            }
            for name, entry in zip(names, entries, strict=True)
        ],
        "files": hashes,
    }
    storage.write_bytes(folder / MANIFEST_FILE, (json.dumps(manifest, indent=2) + "\n").encode())
    shutil.rmtree(journal.folder)
    return manifest


def verify_dataset(folder: str | Path) -> list[str]:
    """A sentence for each file that differs from the manifest of the dataset in `folder`."""
    manifest = read_manifest(folder)
    hashes = {shard["name"]: shard["sha256"] for shard in manifest["shards"]} | manifest["files"]
    problems = []
    for name, sha256 in hashes.items():
        path = storage.join(folder, name)
        if not storage.exists(path, DataError):
            problems.append(f"{name} is missing.")
        elif (actual := _file_hash(path)) != sha256:
            problem = f"its SHA-256 is {actual}, not {sha256}"
            problems.append(f"{name} does not match its manifest: {problem}.")
    return problems


def sum_counts(entries: Sequence[ShardEntry], source: int | None = None) -> dict[str, int]:
    """The sums of the entries' counts, of one source or all."""
    counts = [c for e in entries for number, c in e.counts.items() if source in (None, number)]
    return {name: sum(count[name] for count in counts) for name in COUNTS}


def rejected_lines(entries: Iterable[ShardEntry]) -> bytes:
    """Lines of REJECTED_FILE: file, line and reason of each bad record."""
    return _lines(line for entry in entries for line in entry.rejected)


def sources_lines(files: Iterable[SourceFile]) -> bytes:
    """Lines of SOURCES_FILE: name, bytes and SHA-256 of each file that was read."""
    return _lines(
        {"source": file.source, "file": file.name, "bytes": file.bytes, "sha256": file.sha256}
        for file in files
    )


def _lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    # A file's name may have bytes that are not UTF-8; json.dumps escapes them.
    return "".join(json.dumps(record) + "\n" for record in records).encode()
