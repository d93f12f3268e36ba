"""Which dataset each row of a run comes from, by weights that may change on the way.

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
        """Start with `weights`; each of `changes` is a first row and the weights from there on.

        Weights are relative, not negative, and not all zero; first rows increase.
        """
        self._first_rows = [0]
        self._shares = [_shares(weights)]
        self._counts = [[0] * len(weights)]
        for first_row, changed in changes:
            counts = self.counts(first_row)
            self._first_rows.append(first_row)
            self._shares.append(_shares(changed))
            self._counts.append(counts)

    def counts(self, row: int) -> list[int]:
        """How many of the rows before `row` are of each dataset."""
        stage = bisect.bisect_right(self._first_rows, row) - 1
        left = row - self._first_rows[stage]
        counts = []
        for share, before in zip(self._shares[stage], self._counts[stage], strict=True):
            taken = _round(left * share)
            counts.append(before + taken)
            left -= taken
        return counts

    def locate(self, row: int) -> tuple[int, int]:
        """The dataset of row `row`, and the row's number among those of that dataset."""
        before, after = self.counts(row), self.counts(row + 1)
        dataset = next(d for d, count in enumerate(after) if count != before[d])
        return dataset, before[dataset]


def _shares(weights: Sequence[float]) -> list[Fraction]:
    """Each weight over the sum of it and those after it, exactly as the decimals say."""
    exact = [Fraction(repr(weight)) for weight in weights]
    rest = [sum(exact[d:], Fraction(0)) for d in range(len(exact))]
    return [w / r if r else Fraction(0) for w, r in zip(exact, rest, strict=True)]


def _round(number: Fraction) -> int:
    """The nearest whole number, halves upwards: never down where `number` grows."""
    return (2 * number.numerator + number.denominator) // (2 * number.denominator)
