"""Order in which storage has the values of a tensor, and which parts of it one request reads."""

import dataclasses
import math
from collections.abc import Iterable

# A slice with start and stop, and no step, for each axis.
Part = tuple[slice, ...]
# Bytes that follow each other and are worth a request of their own: several are under way at a
# time, and at 50 MB/s each the latency of a bucket is no longer most of the time.
SEQUENTIAL_BYTES = 2 << 20


@dataclasses.dataclass(frozen=True)
class StorageLayout:
    """Layout of a tensor: its `axes`, the slowest first, and the stored `itemsize`. A reader needs
    all of the `uncut` axes. Arrays in chunks are read by multiples of `chunk`. While it is read, a
    value takes `converted_itemsize` on the host, where that is more."""

    axes: tuple[int, ...]
    itemsize: int
    uncut: tuple[int, ...] = ()
    chunk: tuple[int, ...] | None = None
    converted_itemsize: int = dataclasses.field(default=0, compare=False)

    @classmethod
    def c_order(cls, ndim: int, itemsize: int) -> "StorageLayout":
        """The layout of a plain array."""
        return cls(tuple(range(ndim)), itemsize)

    @property
    def is_c_order(self) -> bool:
        """True where any rows of the tensor follow each other in storage."""
        return self == self.c_order(len(self.axes), self.itemsize)

    @property
    def host_itemsize(self) -> int:
        """Bytes of a value on the host while it is read."""
        return max(self.itemsize, self.converted_itemsize)

    def step(self, axis: int) -> int:
        """The length of which parts should be multiples along `axis`."""
        return 1 if self.chunk is None else self.chunk[axis]

    def repeated(self, axis: int, times: int) -> "StorageLayout":
        """The layout where each entry along `axis` stands for so many."""
        if self.chunk is None or times == 1:
            return self
        chunk = (*self.chunk[:axis], self.chunk[axis] * times, *self.chunk[axis + 1 :])
        return dataclasses.replace(self, chunk=chunk)

    def reads_well(self, shape: tuple[int, ...], part: Part) -> bool:
        """True where `part` of a tensor of this shape costs about its own bytes, in long runs."""
        if any(part[axis] != slice(0, shape[axis]) for axis in self.uncut):
            return False
        if self.chunk is not None:
            return all(
                s.start % step == 0 and (s.stop % step == 0 or s.stop == size)
                for s, step, size in zip(part, self.chunk, shape, strict=True)
            )
        run = self.run_bytes(shape, part)
        return run >= min(SEQUENTIAL_BYTES, self.itemsize * math.prod(map(_length, part)))

    def run_bytes(self, shape: tuple[int, ...], part: Part) -> int:
        """Bytes of the longest contiguous runs of `part`."""
        run = self.itemsize
        for axis in reversed(self.axes):
            run *= _length(part[axis])
            if part[axis] != slice(0, shape[axis]):
                break
        return run


def merged(parts: Iterable[Part | None]) -> list[Part]:
    """The distinct `parts`, or the one part that they fill together: neighbouring columns become
    rows that are read contiguously."""
    distinct = [part for part in dict.fromkeys(parts) if part is not None]
    if not distinct:
        return []
    box = tuple(
        slice(min(s.start for s in axis), max(s.stop for s in axis))
        for axis in zip(*distinct, strict=True)
    )
    filled = sum(math.prod(map(_length, part)) for part in distinct)
    return [box] if filled == math.prod(map(_length, box)) else distinct


def _length(s: slice) -> int:
    return s.stop - s.start
