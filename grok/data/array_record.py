"""ArrayRecord files as `grok data prepare` writes them (group_size:1, uncompressed), read from
ranges of bytes: the library's own reader opens files on this machine alone.

The format (github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md): chunks one
after the other, interrupted by a block header of 24 bytes wherever the offset is a multiple of 64
KiB. A chunk is a header of 40 bytes (hash, size of the data, hash, type with the number of records,
size of the records) and data: 0 (uncompressed), sizes of the records, records. Of an ArrayRecord
file every document has a chunk; the last block has a chunk whose record says where the footer is,
whose records, after the first, say where each chunk begins. Hashes are not checked here: `grok data
inspect --check` verifies the files entirely."""

import itertools
import struct
from collections.abc import Callable

import numpy as np

BLOCK = 1 << 16
BLOCK_HEADER = 24
CHUNK_HEADER = struct.Struct("<QQQQQ")
POSTSCRIPT_MAGIC = 0x71930E704FDAE05E


def read_offsets(size: int, read: Callable[[int, int], bytes]) -> np.ndarray:
    """Offsets at which the chunks of a file of `size` bytes begin, int64 (N + 1,), the last being
    where they end. `read` gives the bytes from one offset to another. Raises ValueError for what is
    no such file."""
    if size < 2 * BLOCK or size % BLOCK:
        raise ValueError(f"{size} bytes are no ArrayRecord file")
    last = size - BLOCK
    postscript, *_ = read_chunk(read(last, size), last, last)  # repeated
    fields = _fields(postscript)
    footer_at = fields.get(1, 0)
    if fields.get(2) != POSTSCRIPT_MAGIC or not 0 < footer_at < last:
        raise ValueError("its end is no end of an ArrayRecord file")
    _, *chunks = read_chunk(read(footer_at, last), footer_at, footer_at)
    entries = [_fields(chunk) for chunk in chunks]
    if any(entry.get(3) != 1 for entry in entries):
        raise ValueError("its chunks have several documents each")
    offsets = [*(entry.get(1, 0) for entry in entries), footer_at]
    if any(begin >= end for begin, end in itertools.pairwise(offsets)):
        raise ValueError("its chunks are not in order")
    return np.array(offsets, np.int64)


def read_chunk(data: bytes | memoryview, base: int, begin: int) -> list[bytes]:
    """The records of the chunk that begins at offset `begin`, of bytes of a file from offset `base`
    on. Raises ValueError where there is none, or a compressed one."""
    header, position = _without_block_headers(data, base, begin, CHUNK_HEADER.size)
    _, size, _, kind_and_count, decoded = CHUNK_HEADER.unpack(header)
    content, _ = _without_block_headers(data, base, position, size)
    if kind_and_count & 0xFF != ord("r") or content[:1] != b"\0":
        raise ValueError("a chunk is of another kind, or compressed")
    sizes_bytes, position = _varint(content, 1)
    end, sizes = position + sizes_bytes, []
    while position < end:
        record_size, position = _varint(content, position)
        sizes.append(record_size)
    if len(sizes) != kind_and_count >> 8 or sum(sizes) != decoded or end + decoded != size:
        raise ValueError("sizes in a chunk do not add up")
    ends = np.cumsum(sizes) + end
    return [content[stop - n : stop] for stop, n in zip(ends, sizes, strict=True)]


def _without_block_headers(
    data: bytes | memoryview, base: int, begin: int, size: int
) -> tuple[bytes, int]:
    """`size` bytes of content from offset `begin` on, and the offset behind them."""
    parts, at = [], begin
    while size:
        if at % BLOCK == 0:
            at += BLOCK_HEADER
        count = min(size, BLOCK - at % BLOCK)
        part = data[at - base : at - base + count]
        if len(part) < count:
            raise ValueError("a chunk is longer than its place")
        parts.append(part)
        at, size = at + count, size - count
    return b"".join(parts), at


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """An integer of seven bits a byte, and the position behind it."""
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise ValueError("a number does not end")
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _fields(message: bytes) -> dict[int, int]:
    """The integer fields of a protocol buffer that has no others, by number."""
    fields, position = {}, 0
    while position < len(message):
        tag, position = _varint(message, position)
        if tag & 7:
            raise ValueError("a footer has a field that is no integer")
        fields[tag >> 3], position = _varint(message, position)
    return fields
