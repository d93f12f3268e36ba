"""What a file holds, record by record: plain text, JSON lines, Parquet, each perhaps compressed.

Damage becomes a problem in the place of a record, and what came before it survives.
"""

import io
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Protocol

CHUNK_BYTES = 1 << 20  # bytes that are read at once
ROWS = 256  # of a Parquet file that are turned into Python objects at once


class FileInfo(Protocol):
    """What is to be known of a file: gzip, zstd or no compression, and its size."""

    @property
    def compression(self) -> str | None:
        """Name of the compression."""
        ...

    @property
    def bytes(self) -> int:
        """Size of the file."""
        ...


# What a reader yields: line, data, problem, and bytes of the file read so far.
Read = tuple[int | None, Any, str | None, int]


def _read_text(file: BinaryIO, about: FileInfo, columns: Sequence[str]) -> Iterator[Read]:
    chunks = []
    for chunk, problem in _chunks(file, about.compression):
        if problem:
            yield None, None, problem, about.bytes
            return
        chunks.append(chunk)
    yield None, b"".join(chunks), None, about.bytes


def _read_lines(file: BinaryIO, about: FileInfo, columns: Sequence[str]) -> Iterator[Read]:
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
        while chunk := file.read(CHUNK_BYTES):
            yield chunk, None
        return
    from zstandard import ZstdDecompressor, ZstdError

    pending = file.read(CHUNK_BYTES)
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
            pending = stream.unused_data if stream.eof else file.read(CHUNK_BYTES)
        pending = pending or file.read(CHUNK_BYTES)


def _read_parquet(file: BinaryIO, about: FileInfo, columns: Sequence[str]) -> Iterator[Read]:
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


READERS = {"text": _read_text, "jsonl": _read_lines, "parquet": _read_parquet}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
