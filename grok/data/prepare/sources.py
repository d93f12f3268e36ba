"""Source files of text, local or at gs://, as a sequence of raw records."""

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
from grok.data.prepare.formats import CHUNK_BYTES, SourceFile, read_rows
from grok.errors import DataError

SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}


class RawRecord(NamedTuple):
    """A record as it was read, or the `problem` in its place.

    file: number of its file; number: of the record in the file, from 0; line: in the file (row, in
    Parquet), from 1, None where the file is one document; data: bytes of a text or a line, or a
    row; offset: bytes of the file read so far.
    """

    file: int
    number: int
    line: int | None
    data: bytes | dict[str, Any] | None
    problem: str | None
    offset: int


def find_files(
    sources: Sequence[str], patterns: Sequence[str] = (), format: str = "auto"
) -> list[SourceFile]:
    """The files of all sources in a fixed order, without hidden ones inside folders.

    Args:
      sources: files or folders, local or at gs://.
      patterns: such as *.md; a file inside a folder must match one, if there are any.
      format: text, jsonl or parquet, or auto: by the name's suffix, text where that is unknown.

    Raises DataError where a source does not exist or has no such files.
    """
    if not sources:
        raise DataError("no sources were given; a file or folder of text would work.")
    files = []
    for number, source in enumerate(sources):
        sizes = _list_files(source, patterns)
        if not sizes:
            matching = f" that match {' or '.join(patterns)}" if patterns else ""
            raise DataError(f"source {source} has no files{matching}; one with text would work.")
        for name, size in sorted(sizes):
            files.append(SourceFile(number, name, *_format_of(name, format), size))
    return files


def hash_files(files: Sequence[SourceFile]) -> list[SourceFile]:
    """The files with their SHA-256, each read once; DataError where one cannot be read."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        hashes = list(pool.map(lambda file: _sha256(file.name), files))
    return [
        dataclasses.replace(file, sha256=sha256) for file, sha256 in zip(files, hashes, strict=True)
    ]


def read_records(
    files: Sequence[SourceFile], columns: Sequence[str], start: tuple[int, int] = (0, 0)
) -> Iterator[RawRecord]:
    """All records of the files in order, from record start[1] of file start[0] on.

    `columns` are read of Parquet files. Raises DataError where a file cannot be read at all; damage
    inside one is a record with a problem.
    """
    for number in range(start[0], len(files)):
        file = files[number]
        skipped = start[1] if number == start[0] else 0
        with open_source(file.name) as opened:
            rows = read_rows(opened, file, columns)
            for index, row in enumerate(itertools.islice(rows, skipped, None), start=skipped):
                yield RawRecord(number, index, *row)


@contextlib.contextmanager
def open_source(name: str) -> Iterator[BinaryIO]:
    """A file for reading, here or at gs://; DataError where opening or reading it fails."""
    with _read_errors(name), storage.open_file(name) as file:
        yield file


def _list_files(source: str, patterns: Sequence[str]) -> list[tuple[str, int]]:
    """Names and bytes of a source's files."""
    with _read_errors(source):
        if storage.is_remote(source):
            return _remote_listing(source, patterns)
        path = Path(source)
        if not path.is_dir():
            return [(source, path.stat().st_size)]
        sizes = []
        for folder, folders, names in os.walk(source):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                file = Path(folder) / name
                if _is_included(name, patterns) and file.is_file():
                    sizes.append((str(file), file.stat().st_size))
        return sizes


def _remote_listing(source: str, patterns: Sequence[str]) -> list[tuple[str, int]]:
    system, root = storage.remote(source.rstrip("/"))
    sizes = {name: entry["size"] for name, entry in system.find(root, detail=True).items()}
    if not sizes:
        raise FileNotFoundError
    if list(sizes) == [root]:
        return [(source, sizes[root])]
    return [
        (f"gs://{name}", size)
        for name, size in sizes.items()
        if not any(part.startswith(".") for part in name.removeprefix(root).split("/"))
        and _is_included(name.rpartition("/")[2], patterns)
    ]


def _is_included(name: str, patterns: Sequence[str]) -> bool:
    if not name or name.startswith("."):
        return False
    return not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _format_of(name: str, format: str) -> tuple[str, str | None]:
    """Format and compression of a file; the format by its name where `format` is auto."""
    stem, suffix = os.path.splitext(name)
    compression = COMPRESSIONS.get(suffix.lower())
    if compression:
        suffix = os.path.splitext(stem)[1]
    return SUFFIXES.get(suffix.lower(), "text") if format == "auto" else format, compression


def _sha256(name: str) -> str:
    digest = hashlib.sha256()
    with open_source(name) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _read_errors(name: str) -> Iterator[None]:
    """Turns what goes wrong inside into a DataError with the reason why `name` cannot be read."""
    try:
        with storage.errors(name):
            yield
    except FileNotFoundError:
        raise DataError(f"source {name} does not exist; a file or folder would work.") from None
    except OSError as error:
        raise DataError(f"source {name} cannot be read: {storage.reason(error)}.") from error
