"""Source files of text, local or at gs://, as a sequence of raw records."""

import contextlib
import dataclasses
import fnmatch
import hashlib
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from grok import storage
from grok.data.prepare import streams
from grok.data.prepare.parquet_rows import read_parquet
from grok.errors import DataError

RECORD_BYTES = 256 * 10**6  # of a record, decompressed, at most


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file to read: number of its source, name as given, format, compression, size and hash."""

    source: int
    name: str
    format: str
    compression: str | None
    bytes: int
    sha256: str = ""


class Row(NamedTuple):
    """A record as a file has it, or the `problem` in its place."""

    line: int | None  # from 1 (row, in Parquet); None where the file is one document
    data: bytes | dict[str, Any] | None  # a text, a line, or a row
    problem: str | None
    offset: int  # bytes of the file read so far
    lost_bytes: int = 0  # of the file, that cannot be read
    records: int = 1  # that have the problem
    is_damage: bool = False  # the rest of the file, or of a row group, is lost


def read_rows(
    file: BinaryIO, source: SourceFile, columns: Sequence[str], most_bytes: int
) -> Iterator[Row]:
    """Rows of a file by its format; `columns` are read of a Parquet file. One of more than
    `most_bytes`, decompressed, is a problem, and not held in memory."""
    row = Row(0 if source.format == "jsonl" else None, None, None, 0)
    try:
        for row in READERS[source.format](file, source, columns, most_bytes):
            yield row
    except streams.Damaged as error:
        line = None if row.line is None else row.line + 1
        lost = source.bytes - row.offset
        yield Row(line, None, str(error), source.bytes, lost, is_damage=True)
    except streams.TooLong:
        problem = too_long(most_bytes)
        yield Row(None, None, problem, source.bytes, source.bytes, is_damage=True)


def too_long(most_bytes: int) -> str:
    """The problem of a record that has more bytes than it may have."""
    return f"has more than {most_bytes:,} bytes"


def _read_lines(
    file: BinaryIO, source: SourceFile, columns: Sequence[str], most_bytes: int
) -> Iterator[Row]:
    chunks = streams.chunks(file, source.compression)
    for number, line in enumerate(streams.lines(chunks, most_bytes), start=1):
        if line is None:
            yield Row(number, None, too_long(most_bytes), file.tell())
        elif line.strip():
            yield Row(number, line, None, file.tell())


def _read_text(
    file: BinaryIO, source: SourceFile, columns: Sequence[str], most_bytes: int
) -> Iterator[Row]:
    text = streams.text(streams.chunks(file, source.compression), most_bytes)
    yield Row(None, text, None, source.bytes)


def _read_parquet(
    file: BinaryIO, source: SourceFile, columns: Sequence[str], most_bytes: int
) -> Iterator[Row]:
    if source.compression:
        file = io.BytesIO(streams.text(streams.chunks(file, source.compression), most_bytes))
    num_rows, rows = read_parquet(file, columns, most_bytes)
    for row in rows:
        offset = source.bytes * row.line // num_rows
        damage = row.rows, row.is_damage
        yield Row(row.line, row.data, row.problem, offset, 0, *damage)


READERS = {"jsonl": _read_lines, "text": _read_text, "parquet": _read_parquet}
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}


class RawRecord(NamedTuple):
    """A record as it was read, or the `problem` in its place."""

    file: int  # number of its file
    number: int  # in the file, from 0
    line: int | None  # and what follows: as of `Row`
    data: bytes | dict[str, Any] | None
    problem: str | None
    offset: int
    lost_bytes: int = 0
    records: int = 1
    is_damage: bool = False


def find_files(
    sources: Sequence[str], patterns: Sequence[str] = (), format: str = "auto"
) -> list[SourceFile]:
    """The files of all sources, local or at gs://, in a fixed order; inside folders those that are
    not hidden and match one of `patterns`, such as *.md, if there are any. `format` is text, jsonl
    or parquet, or auto: by the name's suffix, text where that is unknown. Raises DataError where a
    source does not exist or has no such files."""
    if not sources:
        raise DataError("no sources were given; a file or folder of text would work.")
    files = []
    for number, source in enumerate(sources):
        if not (sizes := _list_files(source, patterns)):
            matching = f" that match {' or '.join(patterns)}" if patterns else ""
            raise DataError(f"source {source} has no files{matching}; one with text would work.")
        for name, size in sorted(sizes):
            files.append(SourceFile(number, name, *_format_of(name, format), size))
    return files


def hash_files(files: Sequence[SourceFile]) -> list[SourceFile]:
    """The files with their SHA-256, each read once; DataError where one cannot be read."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(_hash, files))


def read_records(
    files: Sequence[SourceFile],
    columns: Sequence[str],
    start: tuple[int, int] = (0, 0),
    most_bytes: int = RECORD_BYTES,
) -> Iterator[RawRecord]:
    """All records of the files in order, from record start[1] of file start[0] on. `columns` are
    read of Parquet files. Raises DataError where a file cannot be read at all; damage inside one,
    or a record of more than `most_bytes`, is a record with a problem."""
    for number in range(start[0], len(files)):
        file = files[number]
        skipped = start[1] if number == start[0] else 0
        with _open(file.name) as opened:
            rows = read_rows(opened, file, columns, most_bytes)
            for index, row in enumerate(itertools.islice(rows, skipped, None), start=skipped):
                yield RawRecord(number, index, *row)


@contextlib.contextmanager
def _open(name: str) -> Iterator[BinaryIO]:
    with storage.errors(f"source {name}", DataError), storage.open_file(name) as file:
        yield file


def _list_files(source: str, patterns: Sequence[str]) -> list[tuple[str, int]]:
    with storage.errors(f"source {source}", DataError):
        if storage.is_remote(source):
            return _remote_listing(source, patterns)
        if not os.path.isdir(source):
            return [(source, os.stat(source).st_size)]
        return [
            (str(file), file.stat().st_size)
            for folder, names in _walk(source)
            for file in (Path(folder, name) for name in names if _is_included(name, patterns))
            # A pipe has no end; a link that leads nowhere is an error.
            if file.is_symlink() or file.is_file()
        ]


def _walk(source: str) -> Iterator[tuple[str, list[str]]]:
    """Yields each folder that is not hidden, and the names of its files. Links are followed, each
    folder once, so that one that leads back does no harm."""
    walked = set()
    for folder, folders, names in os.walk(source, followlinks=True):
        walked.add(os.path.realpath(folder))
        folders[:] = [
            name
            for name in sorted(folders)
            if not name.startswith(".")
            and os.path.realpath(os.path.join(folder, name)) not in walked
        ]
        yield folder, names


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
    matches = not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    return bool(name) and not name.startswith(".") and matches


def _format_of(name: str, format: str) -> tuple[str, str | None]:
    """Format and compression of a file; the format by its name where `format` is auto."""
    stem, suffix = os.path.splitext(name)
    if compression := COMPRESSIONS.get(suffix.lower()):
        suffix = os.path.splitext(stem)[1]
    return SUFFIXES.get(suffix.lower(), "text") if format == "auto" else format, compression


def _hash(file: SourceFile) -> SourceFile:
    digest = hashlib.sha256()
    with _open(file.name) as opened:
        while chunk := opened.read(streams.CHUNK_BYTES):
            digest.update(chunk)
    return dataclasses.replace(file, sha256=digest.hexdigest())
