"""Files of text as a sequence of raw records: plain text, JSON lines, Parquet, here or at gs://.

What cannot be read of a file becomes a record with a problem, and what came before it survives.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import hashlib
import io
import itertools
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from grok.errors import DataError

FORMATS = ("text", "jsonl", "parquet")
SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
CHUNK = 1 << 20
ROWS = 256  # of a Parquet file that are turned into Python objects at once


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
      kind: one of FORMATS, or auto: by the name's ending, text where that says nothing.

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
                _READERS[file.format](opened, file, columns), skipped, None
            ):
                index = skipped + next(numbers)
                yield RawRecord(number, index, line, data, problem, offset)


@contextlib.contextmanager
def open_source(name: str) -> Iterator[BinaryIO]:
    """A file for reading, here or at gs://; DataError where opening or reading it fails."""
    with _reading(name):
        if is_remote(name):
            with _google_storage("STORAGE_EMULATOR_HOST" in os.environ).open(name, "rb") as file:
                yield file
        else:
            with open(name, "rb") as file:
                yield file


def is_remote(name: str) -> bool:
    """Whether `name` is a URL such as gs://bucket/folder."""
    return "://" in name


def _listing(source: str, patterns: Sequence[str]) -> list[tuple[str, int]]:
    """Names and bytes of a source's files."""
    with _reading(source):
        if is_remote(source):
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
    system = _google_storage("STORAGE_EMULATOR_HOST" in os.environ)
    root = source.removeprefix("gs://").rstrip("/")
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
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# What a reader yields: line, data, problem, and bytes of the file read so far.
_Read = tuple[int | None, Any, str | None, int]


def _read_text(file: BinaryIO, about: SourceFile, columns: Sequence[str]) -> Iterator[_Read]:
    chunks = []
    for chunk, problem in _chunks(file, about.compression):
        if problem:
            yield None, None, problem, about.bytes
            return
        chunks.append(chunk)
    yield None, b"".join(chunks), None, about.bytes


def _read_lines(file: BinaryIO, about: SourceFile, columns: Sequence[str]) -> Iterator[_Read]:
    """Lines that are not blank."""
    number, tail = 1, b""
    for chunk, problem in _chunks(file, about.compression):
        if problem:
            yield number, None, problem, about.bytes
            return
        *lines, tail = (tail + chunk).split(b"\n")
        offset = file.tell()
        for line in lines:
            if line.strip():
                yield number, line, None, offset
            number += 1
    if tail.strip():
        yield number, tail, None, about.bytes


def _chunks(file: BinaryIO, compression: str | None) -> Iterator[tuple[bytes, str | None]]:
    """Decompressed bytes of a file; at damage, the problem, and no more."""
    if compression is None:
        while chunk := file.read(CHUNK):
            yield chunk, None
        return
    from zstandard import ZstdDecompressor, ZstdError

    pending = file.read(CHUNK)
    while pending:
        # Several streams may follow each other in a file, as `cat a.gz b.gz` makes it.
        stream: Any = (
            zlib.decompressobj(wbits=31)
            if compression == "gzip"
            else ZstdDecompressor().decompressobj()
        )
        while not stream.eof:
            if not pending:
                yield b"", f"the {compression} data breaks off before its end"
                return
            try:
                chunk = stream.decompress(pending)
            except (zlib.error, ZstdError) as error:
                yield b"", f"the {compression} data is damaged ({error})"
                return
            yield chunk, None
            pending = stream.unused_data if stream.eof else file.read(CHUNK)
        pending = pending or file.read(CHUNK)


def _read_parquet(file: BinaryIO, about: SourceFile, columns: Sequence[str]) -> Iterator[_Read]:
    """Rows as dictionaries of `columns`, those of them that there are."""
    import pyarrow
    from pyarrow import parquet

    if about.compression:
        chunks = []
        for chunk, problem in _chunks(file, about.compression):
            if problem:
                yield None, None, problem, about.bytes
                return
            chunks.append(chunk)
        file = io.BytesIO(b"".join(chunks))
    try:
        opened = parquet.ParquetFile(file, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError) as error:
        yield None, None, f"the file is no Parquet or damaged ({_first_line(error)})", about.bytes
        return
    names = [name for name in columns if name in opened.schema_arrow.names]
    first, rows = 1, max(1, opened.metadata.num_rows)
    for group in range(opened.num_row_groups):
        line = first
        try:
            for batch in opened.iter_batches(ROWS, [group], names, use_threads=False):
                for data, problem in _rows(batch):
                    yield line, data, problem, about.bytes * line // rows
                    line += 1
        except (pyarrow.ArrowException, OSError) as error:
            problem = f"the rest of row group {group} is damaged ({_first_line(error)})"
            yield line, None, problem, about.bytes * line // rows
        first += opened.metadata.row_group(group).num_rows


def _rows(batch: Any) -> Iterator[tuple[dict[str, Any] | None, str | None]]:
    for index in range(batch.num_rows):
        try:
            # Without columns a batch has rows and no list of them.
            yield (batch.slice(index, 1).to_pylist() or [{}])[0], None
        except UnicodeDecodeError as error:
            yield None, f"is not UTF-8 at byte {error.start} (0x{error.object[error.start]:02x})"


_READERS = {"text": _read_text, "jsonl": _read_lines, "parquet": _read_parquet}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


@functools.cache
def _google_storage(emulated: bool) -> Any:
    # Imported late: it takes a second, which local files need not cost.
    from gcsfs.core import GCSFileSystem  # type: ignore[import-untyped]

    # An emulator knows no accounts; what was listed is not kept, since others write there.
    return GCSFileSystem(token="anon" if emulated else None, use_listings_cache=False)


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Says of whatever goes wrong inside that `name` cannot be read, and why."""
    try:
        if is_remote(name) and not name.startswith("gs://"):
            raise DataError(f"source {name} is neither on this machine nor at gs://.")
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"source {name} does not exist; a file or folder would work.") from None
    except OSError as error:
        raise DataError(f"source {name} cannot be read: {error.strerror or error}.") from error
    except Exception as error:
        # What clients of remote storage raise (HTTP, accounts, retries) has no class in common.
        if not is_remote(name):
            raise
        raise DataError(f"source {name} cannot be read: {error}.") from error
