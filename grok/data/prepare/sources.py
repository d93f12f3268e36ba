"""Files of text, here or at gs://, as a sequence of raw records.

What cannot be read of a file becomes a record with a problem, and what came before it survives.
"""

import contextlib
import dataclasses
import fnmatch
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from grok import storage
from grok.data.prepare.formats import CHUNK_BYTES, READERS
from grok.errors import DataError

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file to read: which of the sources it is of, its name as given, and what it holds."""

    source: int
    name: str
    format: str
    compression: str | None
    bytes: int
    sha256: str = ""


class RawRecord(NamedTuple):
    """A record as it was read, or the `problem` that stands in its place.

    file: number of its file; number: of the record in it, from 0; line: of the file (row, of a
    Parquet one), from 1, None where the file is one document; data: bytes of a text or a line, or
    a row; offset: bytes of the file that were read until here.
    """

    file: int
    number: int
    line: int | None
    data: bytes | dict[str, Any] | None
    problem: str | None
    offset: int


def find_files(
    sources: Sequence[str], patterns: Sequence[str] = (), kind: str = "auto"
) -> list[SourceFile]:
    """The files of all sources in a fixed order; hidden ones inside folders are left out.

    Args:
      sources: files or folders, here or at gs://.
      patterns: of names such as *.md, one of which a file inside a folder must match; none: all.
      kind: text, jsonl or parquet, or auto: by the name's ending, text where that says nothing.

    Raises DataError where a source does not exist or has no such files.
    """
    if not sources:
        raise DataError("no sources were given; a file or folder of text would work.")
    files = []
    for number, source in enumerate(sources):
        found = _listing(source, patterns)
        if not found:
            wanted = f" that match {' or '.join(patterns)}" if patterns else ""
            raise DataError(f"source {source} has no files{wanted}; one with text would work.")
        for name, size in sorted(found):
            files.append(SourceFile(number, name, *_kind(name, kind), size))
    return files


def hash_files(files: Sequence[SourceFile]) -> list[SourceFile]:
    """The same files with their SHA-256, each read once; DataError where one cannot be read."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        hashes = list(pool.map(lambda file: _sha256(file.name), files))
    return [
        dataclasses.replace(file, sha256=sha256) for file, sha256 in zip(files, hashes, strict=True)
    ]


def read_records(
    files: Sequence[SourceFile], columns: Sequence[str], start: tuple[int, int] = (0, 0)
) -> Iterator[RawRecord]:
    """All records of the files in order, from record start[1] of file start[0] on.

    `columns` are those to read of Parquet files. Raises DataError where a file cannot be read at
    all; damage inside one is a record with a problem.
    """
    for number in range(start[0], len(files)):
        file = files[number]
        numbers = itertools.count()
        skipped = start[1] if number == start[0] else 0
        with open_source(file.name) as opened:
            for line, data, problem, offset in itertools.islice(
                READERS[file.format](opened, file, columns), skipped, None
            ):
                index = skipped + next(numbers)
                yield RawRecord(number, index, line, data, problem, offset)


@contextlib.contextmanager
def open_source(name: str) -> Iterator[BinaryIO]:
    """A file for reading, here or at gs://; DataError where opening or reading it fails."""
    with _reading(name), storage.open_file(name) as file:
        yield file


def _listing(source: str, patterns: Sequence[str]) -> list[tuple[str, int]]:
    """Names and bytes of a source's files."""
    with _reading(source):
        if storage.is_remote(source):
            return _remote_listing(source, patterns)
        path = Path(source)
        if not path.is_dir():
            return [(source, path.stat().st_size)]
        found = []
        for folder, folders, names in os.walk(source):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                file = Path(folder) / name
                if _wanted(name, patterns) and file.is_file():
                    found.append((str(file), file.stat().st_size))
        return found


def _remote_listing(source: str, patterns: Sequence[str]) -> list[tuple[str, int]]:
    system, root = storage.remote(source.rstrip("/"))
    found = {name: entry["size"] for name, entry in system.find(root, detail=True).items()}
    if not found:
        raise FileNotFoundError
    if list(found) == [root]:
        return [(source, found[root])]
    return [
        (f"gs://{name}", size)
        for name, size in found.items()
        if not any(part.startswith(".") for part in name.removeprefix(root).split("/"))
        and _wanted(name.rpartition("/")[2], patterns)
    ]


def _wanted(name: str, patterns: Sequence[str]) -> bool:
    if not name or name.startswith("."):
        return False
    return not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _kind(name: str, kind: str) -> tuple[str, str | None]:
    """Format and compression of a file, by its name where `kind` is auto."""
    stem, suffix = os.path.splitext(name)
    compression = COMPRESSIONS.get(suffix.lower())
    if compression:
        suffix = os.path.splitext(stem)[1]
    return SUFFIXES.get(suffix.lower(), "text") if kind == "auto" else kind, compression


def _sha256(name: str) -> str:
    digest = hashlib.sha256()
    with open_source(name) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Says of whatever goes wrong inside that `name` cannot be read, and why."""
    try:
        with storage.errors(name):
            yield
    except FileNotFoundError:
        raise DataError(f"source {name} does not exist; a file or folder would work.") from None
    except OSError as error:
        raise DataError(f"source {name} cannot be read: {storage.reason(error)}.") from error
