"""The dataset that each row of a run comes from, by weights that may change during the run.

D datasets.
"""

import bisect
from collections.abc import Sequence
from fractions import Fraction


class Mixture:
    """Spreads rows over D datasets as evenly as whole rows allow, in closed form.

    The first dataset gets its share of all rows, rounded; the second its share of the rows that are
    left; and so on. Each of these counts grows by no more than one from row to row, so every row
    belongs to exactly one dataset, and after any number of rows each count is within D of exact.
    """

    def __init__(
        self, weights: Sequence[float], changes: Sequence[tuple[int, Sequence[float]]] = ()
    ) -> None:
        """Starts with `weights`; each of `changes` is a first row and the weights from there on.

        Weights are relative, not negative, and not all zero; first rows increase.
        """
        self._first_rows = [0]
        self._shares = [_shares(weights)]
        self._counts = [[0] * len(weights)]
        for first_row, new_weights in changes:
            counts = self.counts(first_row)
            self._first_rows.append(first_row)
            self._shares.append(_shares(new_weights))
            self._counts.append(counts)

    def counts(self, row: int) -> list[int]:
        """Number of the rows before `row` from each dataset."""
        stage = bisect.bisect_right(self._first_rows, row) - 1
        rows_left = row - self._first_rows[stage]
        counts = []
        for share, before in zip(self._shares[stage], self._counts[stage], strict=True):
            taken = _round(rows_left * share)
            counts.append(before + taken)
            rows_left -= taken
        return counts

    def locate(self, row: int) -> tuple[int, int]:
        """The dataset of row `row`, and the row's number among those of that dataset."""
        before, after = self.counts(row), self.counts(row + 1)
        dataset = next(d for d, count in enumerate(after) if count != before[d])
        return dataset, before[dataset]


def _shares(weights: Sequence[float]) -> list[Fraction]:
    """Each weight over the sum of it and those after it, exact in decimals."""
    exact = [Fraction(repr(weight)) for weight in weights]
    sums = [sum(exact[d:], Fraction(0)) for d in range(len(exact))]
    return [w / total if total else Fraction(0) for w, total in zip(exact, sums, strict=True)]


def _round(number: Fraction) -> int:
    """The nearest integer, halves upwards, so that it never falls as `number` grows."""
    return (2 * number.numerator + number.denominator) // (2 * number.denominator)
