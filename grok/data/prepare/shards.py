"""Shards as they are written, and the journal by which a killed job goes on.

Everything lies in a folder of its own until the dataset is whole. A shard is finished when its
entry in the journal is there: `00003.json` beside `00003.arrayrecord`, renamed into place last.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from grok.data.prepare.records import EncodedDocument
from grok.errors import DataError

# Records are read one by one, and their bytes must not depend on a compressor's version.
WRITER_OPTIONS = "group_size:1,uncompressed"
COUNTS = ("documents", "bytes", "tokens", "loss_tokens", "rejected", "duplicates")


@dataclasses.dataclass(kw_only=True)
class ShardEntry:
    """What the journal says of one shard and of the input up to its end.

    sha256, bytes: of its file, which an entry without documents has not; position: file and record
    in it that come next; ended: whether no more input comes; lengths: tokens of each document;
    digests: of their texts, in hexadecimal; counts: by source, of each of COUNTS; rejected: lines
    of the side file.
    """

    sha256: str = ""
    bytes: int = 0
    position: tuple[int, int] = (0, 0)
    ended: bool = False
    lengths: list[int] = dataclasses.field(default_factory=list)
    digests: list[str] = dataclasses.field(default_factory=list)
    counts: dict[int, dict[str, int]] = dataclasses.field(default_factory=dict)
    rejected: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add(self, source: int, **numbers: int) -> None:
        """Add to the counts of a source."""
        counts = self.counts.setdefault(source, dict.fromkeys(COUNTS, 0))
        for name, number in numbers.items():
            counts[name] += number


class ShardJournal:
    """The folder of what is not yet whole, and its finished shards."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Begin, or go on with, the job of this identity; DataError where another was begun."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "job.json"
        if path.exists():
            begun = json.loads(path.read_text())
            if changed := identity_difference(begun, json.loads(json.dumps(identity))):
                raise DataError(
                    f"{folder.parent} was begun with {changed}; the same command as then, another "
                    f"folder, or this one deleted, would work."
                )
        else:
            write_atomically(path, json.dumps(identity, indent=2).encode())
        self.entries: list[ShardEntry] = []
        while (entry := folder / f"{len(self.entries):05}.json").exists():
            data = json.loads(entry.read_text())
            data["counts"] = {int(source): count for source, count in data["counts"].items()}
            data["position"] = tuple(data["position"])
            self.entries.append(ShardEntry(**data))

    @property
    def ended(self) -> bool:
        """Whether all input was read."""
        return bool(self.entries) and self.entries[-1].ended

    @property
    def position(self) -> tuple[int, int]:
        """File, and record in it, that come after the finished shards."""
        return self.entries[-1].position if self.entries else (0, 0)

    def shard_path(self, number: int) -> Path:
        """Where the shard lies until the dataset is whole."""
        return self.folder / f"{number:05}.arrayrecord"

    def append(self, entry: ShardEntry) -> None:
        """Note a shard as finished; its file must be in place."""
        text = json.dumps(dataclasses.asdict(entry), separators=(",", ":"))
        write_atomically(self.folder / f"{len(self.entries):05}.json", text.encode())
        self.entries.append(entry)

    def remove(self) -> None:
        """Drop the folder."""
        shutil.rmtree(self.folder)


class ShardWriter:
    """Writes documents to the next shard of a journal, cut before one that would not fit."""

    def __init__(self, journal: ShardJournal, shard_bytes: int) -> None:
        """Write shards whose records have at most `shard_bytes` bytes, or are one record."""
        self._journal = journal
        self._shard_bytes = shard_bytes
        self._writer: Any = None
        self._size = 0
        self.entry = ShardEntry(position=journal.position)

    def write(self, document: EncodedDocument) -> None:
        """Write a document."""
        if self._writer is None:
            self._writer = ArrayRecordWriter(str(self._unfinished), WRITER_OPTIONS)
        self._writer.write(document.record)
        self._size += len(document.record)
        self.entry.lengths.append(document.tokens)

    def fits(self, document: EncodedDocument) -> bool:
        """Whether the shard may take the document."""
        return not self._size or self._size + len(document.record) <= self._shard_bytes

    def finish(self, position: tuple[int, int], ended: bool = False) -> None:
        """Close the shard: all input before `position` is in it or those before."""
        path = self._journal.shard_path(len(self._journal.entries))
        if self._writer is not None:
            try:
                self._writer.close()
            except RuntimeError as error:
                raise DataError(
                    f"{self._unfinished} cannot be written: {str(error).partition(';')[0]}; with "
                    f"room for it the same command goes on."
                ) from None
            sync(self._unfinished)
            self.entry.sha256, self.entry.bytes = file_hash(self._unfinished)
            os.replace(self._unfinished, path)
        self.entry.position, self.entry.ended = position, ended
        self._journal.append(self.entry)
        self._writer, self._size, self.entry = None, 0, ShardEntry(position=position)

    def abandon(self) -> None:
        """Close the file of a shard that will not be finished now."""
        if self._writer is not None:
            with contextlib.suppress(RuntimeError):
                self._writer.close()

    @property
    def _unfinished(self) -> Path:
        return self._journal.folder / "unfinished.arrayrecord"


@contextlib.contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Keeps other processes from the folder, until this one ends; DataError where one is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{folder.parent} is being written by another process; another folder would work."
            ) from None
        yield


def identity_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first thing in which two identities differ, in words; empty where they are equal."""
    for key in sorted({*old, *new}):
        if old.get(key) == new.get(key):
            continue
        if key != "options":
            return f"another {key.replace('_', ' ')}" if key != "sources" else "other sources"
        for name, value in sorted(old[key].items()):
            if value != new[key].get(name):
                return f"{name}={value}, not {new[key].get(name)}"
    return ""


def file_hash(path: Path) -> tuple[str, int]:
    """SHA-256 and bytes of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_size


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, whenever the process is killed."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_bytes(data)
    sync(beside)
    os.replace(beside, path)


def sync(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
