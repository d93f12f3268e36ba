"""Readers of source files, record by record: plain text, JSON lines, Parquet, perhaps compressed.

Damage becomes a record with a problem; the records before it survive.
"""

import dataclasses
import io
import itertools
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


class Damaged(Exception):
    """The reason why the rest of a file cannot be read."""


def read_rows(file: BinaryIO, source: SourceFile, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a file by its format; `columns` are read of a Parquet file."""
    if source.format == "jsonl":
        yield from _read_lines(file, source)
        return
    try:
        data = file
        if source.compression:
            data = io.BytesIO(b"".join(_chunks(file, source.compression)))
        if source.format == "parquet":
            yield from _read_parquet(data, source, columns)
        else:
            yield None, data.read(), None, source.bytes
    except Damaged as error:
        yield None, None, str(error), source.bytes


def _read_lines(file: BinaryIO, source: SourceFile) -> Iterator[Row]:
    """The lines that are not blank."""
    number, tail = 1, b""
    try:
        for chunk in _chunks(file, source.compression):
            *lines, tail = (tail + chunk).split(b"\n")
            offset = file.tell()
            for line in lines:
                if line.strip():
                    yield number, line, None, offset
                number += 1
    except Damaged as error:
        yield number, None, str(error), source.bytes
        return
    if tail.strip():
        yield number, tail, None, source.bytes


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
        stream: Any = (
            zlib.decompressobj(wbits=31)
            if compression == "gzip"
            else ZstdDecompressor().decompressobj()
        )
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
        parquet_file = parquet.ParquetFile(file, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise Damaged(f"the file is no Parquet or damaged ({_first_line(error)})") from None
    names = [name for name in columns if name in parquet_file.schema_arrow.names]
    first, rows = 1, max(1, parquet_file.metadata.num_rows)
    for group in range(parquet_file.num_row_groups):
        line = first
        try:
            batches = parquet_file.iter_batches(
                PARQUET_BATCH_ROWS, [group], names, use_threads=False
            )
            for data, problem in itertools.chain.from_iterable(map(_batch_rows, batches)):
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


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
