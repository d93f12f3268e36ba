"""Ranges of a remote file, and the requests that bring them."""

from collections.abc import Iterator, Sequence

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
