"""Ranges of a file, and the requests that bring them of a remote one."""

import os
from collections.abc import Iterator, Sequence

TRUNCATED = "it became shorter while it was read"
# Bytes of one request for values, of which several are under way; and of gaps that are not worth
# another request.
REQUEST_BYTES, GAP_BYTES = 1 << 24, 1 << 16


def requests(starts: Sequence[int], length: int) -> Iterator[tuple[int, int]]:
    """Yields (begin, end) of what is requested of a remote file for ranges of one length that begin
    at `starts`: at most REQUEST_BYTES each, together at most half more than the ranges, or with
    gaps of at most GAP_BYTES."""
    longest_gap = max(GAP_BYTES, length // 2)
    for first, last in _joined(starts, length, longest_gap):
        for begin in range(first, last, REQUEST_BYTES):
            yield begin, min(begin + REQUEST_BYTES, last)


def _joined(starts: Sequence[int], length: int, longest_gap: int) -> Iterator[tuple[int, int]]:
    begin, end = starts[0], starts[0] + length
    for start in starts[1:]:
        if start - end > longest_gap:
            yield begin, end
            begin = start
        end = start + length
    yield begin, end


def read_exactly(descriptor: int, row: memoryview, offset: int) -> None:
    """Fills a row with the bytes of a local file from `offset` on; OSError where it is shorter."""
    while row:
        # One call reads at most 2 GiB.
        count = os.preadv(descriptor, [row[: 1 << 30]], offset)
        if not count:
            raise OSError(TRUNCATED)
        row, offset = row[count:], offset + count
