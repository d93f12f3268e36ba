"""Bytes of a file, decompressed in chunks of bounded size, and the lines and texts in them."""

import zlib
from collections.abc import Generator, Iterable, Iterator
from typing import Any, BinaryIO

CHUNK_BYTES = 1 << 20
INPUT_BYTES = 1 << 16  # of a compressed file, read at a time
# Bytes of a zstd stream that are decompressed at a time. A block of a few bytes can hold 128 KiB,
# so at worst this becomes some 10^8 bytes.
ZSTD_BYTES = 1 << 12
# As `zstd --ultra --long=31` writes; most streams have windows of 8 MiB at most.
ZSTD_WINDOW_BYTES = 1 << 31


class Damaged(Exception):
    """The reason why the rest of a file cannot be read."""


class TooLong(Exception):
    """A text or line has more bytes than a record may have."""


def chunks(file: BinaryIO, compression: str | None) -> Iterator[bytes]:
    """Decompressed bytes of a file; raises Damaged after what can be read. A file may hold several
    streams, as `cat a.gz b.gz` writes, and zeros behind them, as copies in blocks have."""
    if compression is None:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
        return
    from zstandard import ZstdDecompressor, ZstdError

    pending = file.read(INPUT_BYTES)
    if not pending:
        raise Damaged(f"the {compression} data breaks off before its end")
    while pending:
        try:
            if compression == "gzip":
                pending = yield from _gzip_stream(zlib.decompressobj(31), pending, file)
            else:
                zstd = ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
                pending = yield from _zstd_stream(zstd.decompressobj(), pending, file)
        except (zlib.error, ZstdError) as error:
            raise Damaged(f"the {compression} data is damaged ({error})") from None
        except EOFError:
            raise Damaged(f"the {compression} data breaks off before its end") from None
        pending = pending.lstrip(b"\0")
        while not pending and (pending := file.read(INPUT_BYTES)):
            pending = pending.lstrip(b"\0")


def _gzip_stream(stream: Any, pending: bytes, file: BinaryIO) -> Generator[bytes, None, bytes]:
    """Yields what one stream holds, CHUNK_BYTES at most at a time; returns what is behind it."""
    while not stream.eof:
        chunk = stream.decompress(pending, CHUNK_BYTES)
        if chunk:
            yield chunk
        pending = stream.unconsumed_tail
        # Of a full chunk there may be more, without further input.
        needs_input = not (stream.eof or pending or len(chunk) == CHUNK_BYTES)
        if needs_input and not (pending := file.read(INPUT_BYTES)):
            raise EOFError
    return stream.unused_data


def _zstd_stream(stream: Any, pending: bytes, file: BinaryIO) -> Generator[bytes, None, bytes]:
    """Yields what one stream holds; returns what is behind it."""
    while True:
        for start in range(0, len(pending), ZSTD_BYTES):
            if chunk := stream.decompress(pending[start : start + ZSTD_BYTES]):
                yield chunk
            if stream.eof:
                return stream.unused_data + pending[start + ZSTD_BYTES :]
        if not (pending := file.read(INPUT_BYTES)):
            raise EOFError


def lines(chunks: Iterable[bytes], most_bytes: int) -> Iterator[bytes | None]:
    """Yields each line, without its end; None in place of one of more than `most_bytes`."""
    parts: list[bytes] = []
    size = 0
    for chunk in chunks:
        *ends, tail = chunk.split(b"\n")
        for end in ends:
            size += len(end)
            yield None if size > most_bytes else b"".join([*parts, end])
            parts, size = [], 0
        size += len(tail)
        # What is too long is counted, and not kept.
        if size > most_bytes:
            parts.clear()
        else:
            parts.append(tail)
    yield None if size > most_bytes else b"".join(parts)


def text(chunks: Iterable[bytes], most_bytes: int) -> bytes:
    """All bytes; raises TooLong where they are more than `most_bytes`, which are never held."""
    parts: list[bytes] = []
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > most_bytes:
            raise TooLong
        parts.append(chunk)
    return b"".join(parts)
