"""How far two arrays are apart: how many numbers differ, by how much, and where the most."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class ArrayDifference:
    """How many of `size` numbers differ, by how much at most, and where.

    A relative difference is |a - b| / max(|a|, |b|); where one of the two is not finite both kinds
    are infinite. `place` counts the numbers before the one with the largest absolute difference,
    or is None where nothing differs. `squares` sums (a - b)^2, and `value_squares`, where somebody
    counts it, the squares of a or b. The sum of two differences is that of their arrays one after
    the other.
    """

    size: int = 0
    differing: int = 0
    largest_absolute: float = 0.0
    largest_relative: float = 0.0
    place: int | None = None
    squares: float = 0.0
    value_squares: float = 0.0

    def __add__(self, other: "ArrayDifference") -> "ArrayDifference":
        place = self.place
        if other.place is not None and (
            place is None or other.largest_absolute > self.largest_absolute
        ):
            place = self.size + other.place
        return ArrayDifference(
            self.size + other.size,
            self.differing + other.differing,
            max(self.largest_absolute, other.largest_absolute),
            max(self.largest_relative, other.largest_relative),
            place,
            self.squares + other.squares,
            self.value_squares + other.value_squares,
        )

    @property
    def relative_rms(self) -> float:
        """Root mean square of a - b over that of the values counted in `value_squares`."""
        return math.sqrt(self.squares / self.value_squares) if self.value_squares else 0.0


def array_difference(a: np.ndarray, b: np.ndarray, tolerance: float = 0.0) -> ArrayDifference:
    """The difference of two arrays of one type and size, numbers counted in C order.

    With `tolerance` 0 numbers are equal whose bits are; else also those whose relative difference
    is no more than it.
    """
    a, b = a.reshape(-1), b.reshape(-1)
    bits = f"u{a.itemsize}"
    places = np.flatnonzero(a.view(bits) != b.view(bits))
    if not places.size:
        return ArrayDifference(a.size)
    x, y = a[places].astype(np.float64), b[places].astype(np.float64)
    with np.errstate(invalid="ignore"):
        absolute = np.nan_to_num(np.abs(x - y), nan=np.inf, posinf=np.inf)
    larger = np.maximum(np.abs(x), np.abs(y))
    relative = np.where(np.isfinite(absolute), 0, np.inf)
    # Not for 0 and -0, which differ in their bits alone.
    np.divide(absolute, larger, out=relative, where=np.isfinite(absolute) & (larger > 0))
    far = relative > tolerance if tolerance else np.ones(places.shape, bool)
    if not far.any():
        return ArrayDifference(a.size, squares=float(absolute @ absolute))
    largest = int(np.argmax(np.where(far, absolute, -1)))
    return ArrayDifference(
        a.size,
        int(far.sum()),
        float(absolute[largest]),
        float(relative.max()),
        int(places[largest]),
        squares=float(absolute @ absolute),
    )
