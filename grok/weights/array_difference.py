"""The difference of two arrays: the count, size and position of the values that differ."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class ArrayDifference:
    """`differing` of `size` values differ, at most by the largest differences.

    Relative ones are |a - b| / max(|a|, |b|); both are infinite where a or b is not finite. `index`
    is that of the largest absolute one in C order, or None. `squares` sums (a - b)^2, and
    `value_squares` perhaps those of a or b, whose largest absolute value may be `largest_value`.
    The sum of two is that of concatenated arrays.
    """

    size: int = 0
    differing: int = 0
    largest_absolute: float = 0.0
    largest_relative: float = 0.0
    index: int | None = None
    squares: float = 0.0
    value_squares: float = 0.0
    largest_value: float = 0.0

    def __add__(self, other: "ArrayDifference") -> "ArrayDifference":
        index, larger = self.index, other.largest_absolute > self.largest_absolute
        if other.index is not None and (index is None or larger):
            index = self.size + other.index
        return ArrayDifference(
            self.size + other.size,
            self.differing + other.differing,
            max(self.largest_absolute, other.largest_absolute),
            max(self.largest_relative, other.largest_relative),
            index,
            self.squares + other.squares,
            self.value_squares + other.value_squares,
            max(self.largest_value, other.largest_value),
        )

    @property
    def relative(self) -> float:
        """The largest difference over the largest value."""
        return self.largest_absolute / self.largest_value if self.largest_value else 0.0

    @property
    def relative_rms(self) -> float:
        """Root mean square of a - b over that of the values counted in `value_squares`."""
        return math.sqrt(self.squares / self.value_squares) if self.value_squares else 0.0


def array_difference(a: np.ndarray, b: np.ndarray, tolerance: float = 0.0) -> ArrayDifference:
    """The difference of two arrays of one type and size, with indices in C order. With `tolerance`
    0, values are equal if their bits are; otherwise also if their relative difference is at most
    `tolerance`."""
    a, b = a.reshape(-1), b.reshape(-1)
    bits = f"u{a.itemsize}"
    indices = np.flatnonzero(a.view(bits) != b.view(bits))
    if not indices.size:
        return ArrayDifference(a.size)
    x, y = a[indices].astype(np.float64), b[indices].astype(np.float64)
    with np.errstate(invalid="ignore"):
        absolute = np.nan_to_num(np.abs(x - y), nan=np.inf, posinf=np.inf)
    larger = np.maximum(np.abs(x), np.abs(y))
    relative = np.where(np.isfinite(absolute), 0, np.inf)
    # Not for 0 and -0, which differ in their bits alone.
    np.divide(absolute, larger, out=relative, where=np.isfinite(absolute) & (larger > 0))
    far = relative > tolerance if tolerance else np.ones(indices.shape, bool)
    if not far.any():
        return ArrayDifference(a.size, squares=float(absolute @ absolute))
    largest = int(np.argmax(np.where(far, absolute, -1)))
    return ArrayDifference(
        a.size,
        int(far.sum()),
        float(absolute[largest]),
        float(relative.max()),
        int(indices[largest]),
        squares=float(absolute @ absolute),
    )
