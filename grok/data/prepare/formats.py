"""Readers of source files, record by record: plain text, JSON lines, Parquet, perhaps compressed.

Damage becomes a record with a problem; the records before it survive.
"""

import dataclasses
import io
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

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


def _read_text(file: BinaryIO, source: SourceFile, columns: Sequence[str]) -> Iterator[Row]:
    chunks = []
    for chunk, problem in _chunks(file, source.compression):
        if problem:
            yield None, None, problem, source.bytes
            return
        chunks.append(chunk)
    yield None, b"".join(chunks), None, source.bytes


def _read_lines(file: BinaryIO, source: SourceFile, columns: Sequence[str]) -> Iterator[Row]:
    """The lines that are not blank."""
    number, tail = 1, b""
    for chunk, problem in _chunks(file, source.compression):
        if problem:
            yield number, None, problem, source.bytes
            return
        *lines, tail = (tail + chunk).split(b"\n")
        offset = file.tell()
        for line in lines:
            if line.strip():
                yield number, line, None, offset
            number += 1
    if tail.strip():
        yield number, tail, None, source.bytes


def _chunks(file: BinaryIO, compression: str | None) -> Iterator[tuple[bytes, str | None]]:
    """Decompressed bytes of a file, up to a problem where it is damaged."""
    if compression is None:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk, None
        return
    from zstandard import ZstdDecompressor, ZstdError

    pending = file.read(CHUNK_BYTES)
    while pending:
        # A file may hold several streams, as `cat a.gz b.gz` writes.
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
            pending = stream.unused_data if stream.eof else file.read(CHUNK_BYTES)
        pending = pending or file.read(CHUNK_BYTES)


def _read_parquet(file: BinaryIO, source: SourceFile, columns: Sequence[str]) -> Iterator[Row]:
    """Rows as dictionaries of those of `columns` that the file has."""
    import pyarrow
    from pyarrow import parquet

    if source.compression:
        chunks = []
        for chunk, problem in _chunks(file, source.compression):
            if problem:
                yield None, None, problem, source.bytes
                return
            chunks.append(chunk)
        file = io.BytesIO(b"".join(chunks))
    try:
        parquet_file = parquet.ParquetFile(file, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError) as error:
        yield None, None, f"the file is no Parquet or damaged ({_first_line(error)})", source.bytes
        return
    names = [name for name in columns if name in parquet_file.schema_arrow.names]
    first, rows = 1, max(1, parquet_file.metadata.num_rows)
    for group in range(parquet_file.num_row_groups):
        line = first
        try:
            for batch in parquet_file.iter_batches(
                PARQUET_BATCH_ROWS, [group], names, use_threads=False
            ):
                for data, problem in _batch_rows(batch):
                    yield line, data, problem, source.bytes * line // rows
                    line += 1
        except (pyarrow.ArrowException, OSError) as error:
            problem = f"the rest of row group {group} is damaged ({_first_line(error)})"
            yield line, None, problem, source.bytes * line // rows
        first += parquet_file.metadata.row_group(group).num_rows


def _batch_rows(batch: Any) -> Iterator[tuple[dict[str, Any] | None, str | None]]:
    for index in range(batch.num_rows):
        try:
            # A batch without columns has rows, but to_pylist gives none.
            yield (batch.slice(index, 1).to_pylist() or [{}])[0], None
        except UnicodeDecodeError as error:
            yield None, f"is not UTF-8 at byte {error.start} (0x{error.object[error.start]:02x})"


READERS = {"text": _read_text, "jsonl": _read_lines, "parquet": _read_parquet}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
