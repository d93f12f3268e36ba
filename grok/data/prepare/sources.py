"""Source files of text, local or at gs://, as a sequence of raw records."""

import contextlib
import dataclasses
import fnmatch
import hashlib
import io
import itertools
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from grok import storage
from grok.errors import DataError

CHUNK_BYTES = 1 << 20
PARQUET_BATCH_ROWS = 256  # turned into Python objects at once


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file to read: number of its source, name as given, format, compression, size and hash."""

    source: int
    name: str
    format: str
    compression: str | None
    bytes: int
    sha256: str = ""


# Line, data, problem, and bytes of the file read so far.
Row = tuple[int | None, Any, str | None, int]


class Damaged(Exception):
    """The reason why the rest of a file cannot be read."""


def read_rows(file: BinaryIO, source: SourceFile, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a file by its format; `columns` are read of a Parquet file."""
    number: int | None = None
    try:
        if source.format == "jsonl":
            number, tail = 1, b""
            for chunk in _chunks(file, source.compression):
                *lines, tail = (tail + chunk).split(b"\n")
                offset = file.tell()
                for line in lines:
                    if line.strip():
                        yield number, line, None, offset
                    number += 1
            if tail.strip():
                yield number, tail, None, source.bytes
            return
        data = file
        if source.compression:
            data = io.BytesIO(b"".join(_chunks(file, source.compression)))
        if source.format == "parquet":
            yield from _read_parquet(data, source, columns)
        else:
            yield None, data.read(), None, source.bytes
    except Damaged as error:
        yield number, None, str(error), source.bytes


def _chunks(file: BinaryIO, compression: str | None) -> Iterator[bytes]:
    """Decompressed bytes of a file; raises Damaged after what can be read."""
    if compression is None:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
        return
    from zstandard import ZstdDecompressor, ZstdError

    pending = file.read(CHUNK_BYTES)
    while pending:
        # A file may hold several streams, as `cat a.gz b.gz` writes.
        is_gzip = compression == "gzip"
        stream: Any = zlib.decompressobj(31) if is_gzip else ZstdDecompressor().decompressobj()
        while not stream.eof:
            if not pending:
                raise Damaged(f"the {compression} data breaks off before its end")
            try:
                chunk = stream.decompress(pending)
            except (zlib.error, ZstdError) as error:
                raise Damaged(f"the {compression} data is damaged ({error})") from None
            yield chunk
            pending = stream.unused_data if stream.eof else file.read(CHUNK_BYTES)
        pending = pending or file.read(CHUNK_BYTES)


def _read_parquet(file: BinaryIO, source: SourceFile, columns: Sequence[str]) -> Iterator[Row]:
    """Rows as dictionaries of those of `columns` that the file has."""
    import pyarrow
    from pyarrow import parquet

    try:
        reader = parquet.ParquetFile(file, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise Damaged(f"the file is no Parquet or damaged ({_first_line(error)})") from None
    names = [name for name in columns if name in reader.schema_arrow.names]
    first, rows = 1, max(1, reader.metadata.num_rows)
    for group in range(reader.num_row_groups):
        line = first
        try:
            batches = reader.iter_batches(PARQUET_BATCH_ROWS, [group], names, use_threads=False)
            for data, problem in itertools.chain.from_iterable(map(_batch_rows, batches)):
                yield line, data, problem, source.bytes * line // rows
                line += 1
        except (pyarrow.ArrowException, OSError) as error:
            problem = f"the rest of row group {group} is damaged ({_first_line(error)})"
            yield line, None, problem, source.bytes * line // rows
        first += reader.metadata.row_group(group).num_rows


def _batch_rows(batch: Any) -> Iterator[tuple[dict[str, Any] | None, str | None]]:
    for index in range(batch.num_rows):
        try:
            # A batch without columns has rows, but to_pylist gives none.
            yield (batch.slice(index, 1).to_pylist() or [{}])[0], None
        except UnicodeDecodeError as error:
            yield None, f"is not UTF-8 at byte {error.start} (0x{error.object[error.start]:02x})"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}


class RawRecord(NamedTuple):
    """A record as it was read, or the `problem` in its place."""

    file: int  # number of its file
    number: int  # in the file, from 0
    line: int | None  # in the file (row, in Parquet), from 1; None where that is one document
    data: bytes | dict[str, Any] | None  # a text, a line, or a row
    problem: str | None
    offset: int  # bytes of the file read so far


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
    files: Sequence[SourceFile], columns: Sequence[str], start: tuple[int, int] = (0, 0)
) -> Iterator[RawRecord]:
    """All records of the files in order, from record start[1] of file start[0] on. `columns` are
    read of Parquet files. Raises DataError where a file cannot be read at all; damage inside one is
    a record with a problem."""
    for number in range(start[0], len(files)):
        file = files[number]
        skipped = start[1] if number == start[0] else 0
        with _open(file.name) as opened:
            rows = read_rows(opened, file, columns)
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
        sizes = []
        for folder, folders, names in os.walk(source):
            folders[:] = [name for name in folders if not name.startswith(".")]
            files = [Path(folder, name) for name in names if _is_included(name, patterns)]
            sizes += [(str(file), file.stat().st_size) for file in files if file.is_file()]
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
        while chunk := opened.read(CHUNK_BYTES):
            digest.update(chunk)
    return dataclasses.replace(file, sha256=digest.hexdigest())
