"""Shape of every step's batch, and the rows of data that it is made of. Rows are packed as long as
the longest of the run; a batch of shorter rows splits whole long ones, so that no token is lost. B
rows of a batch, T tokens of a row; R long rows, S tokens of each, k = S / T parts of each."""

import bisect
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

Batch = dict[str, np.ndarray]


class BatchSchedule:
    """Shape of the batch by step; B, T, or both may change at a step."""

    def __init__(
        self, sequence_length: int, batch_size: int, changes: Sequence[tuple[int, int, int]] = ()
    ) -> None:
        """Starts with `batch_size` rows of `sequence_length` tokens, the length of packed rows.
        Each of `changes` is a first step (they increase), and B and T from there on: T divides
        `sequence_length`, and the number of parts divides B."""
        self.sequence_length = sequence_length
        self._first_steps = [0]
        self._stages = [(0, batch_size, sequence_length)]  # first row, B, T
        for first_step, batch_rows, length in changes:
            self._stages.append((self.first_row(first_step), batch_rows, length))
            self._first_steps.append(first_step)

    def shape(self, step: int) -> tuple[int, int]:
        """B and T of the batch of `step`."""
        _, batch_rows, length = self._stages[self._stage(step)]
        return batch_rows, length

    def first_row(self, step: int) -> int:
        """Number of long rows in all batches before `step`."""
        stage = self._stage(step)
        first_row, batch_rows, length = self._stages[stage]
        steps = step - self._first_steps[stage]
        return first_row + steps * (batch_rows * length // self.sequence_length)

    def long_rows(self, step: int, batch_rows: slice) -> range:
        """The long rows that hold rows `batch_rows` of the batch of `step`."""
        num_rows, length = self.shape(step)
        parts = self.sequence_length // length
        start, stop, _ = batch_rows.indices(num_rows)
        first = self.first_row(step)
        return range(first + start // parts, first - (-stop // parts))

    def split(self, step: int, batch_rows: slice, long: Batch) -> Batch:
        """Rows `batch_rows` of the batch of `step`, [B, T], out of its `long_rows`, [R, S]."""
        num_rows, length = self.shape(step)
        if (parts := self.sequence_length // length) == 1:
            return long
        start, stop, _ = batch_rows.indices(num_rows)
        inside = slice(start % parts, start % parts + stop - start)
        batch = {name: a.reshape(-1, length)[inside] for name, a in long.items()}
        if "segment_ids_BT" in batch:
            # Segments count from 1 in each row, and positions from 0 in a segment that was split.
            segments_BT, positions_BT = batch["segment_ids_BT"], batch["positions_BT"]
            first_B1 = segments_BT[:, :1]
            before_BT = np.where(segments_BT == first_B1, positions_BT[:, :1], 0)
            batch["positions_BT"] = positions_BT - before_BT
            batch["segment_ids_BT"] = np.where(segments_BT > 0, segments_BT - first_B1 + 1, 0)
        return batch

    def _stage(self, step: int) -> int:
        return bisect.bisect_right(self._first_steps, step) - 1


class Mixture:
    """Spreads rows over D datasets as evenly as whole rows allow, in closed form. The first dataset
    gets its share of all rows, rounded; the second its share of the rows that are left; and so on.
    Each of these counts grows by no more than one from row to row, so every row belongs to exactly
    one dataset, and after any number of rows each count is within D of exact."""

    def __init__(
        self, weights: Sequence[float], changes: Sequence[tuple[int, Sequence[float]]] = ()
    ) -> None:
        """Starts with `weights`; each of `changes` is a first row and the weights from there on.
        Weights are relative, not negative, and not all zero; first rows increase."""
        self._first_rows = [0]
        self._shares = [_shares(weights)]
        self._counts = [[0] * len(weights)]
        for first_row, new_weights in changes:
            self._counts.append(self.counts(first_row))
            self._first_rows.append(first_row)
            self._shares.append(_shares(new_weights))

    def counts(self, row: int) -> list[int]:
        """Number of the rows before `row` from each dataset."""
        stage = bisect.bisect_right(self._first_rows, row) - 1
        rows_left = row - self._first_rows[stage]
        counts = []
        for share, before in zip(self._shares[stage], self._counts[stage], strict=True):
            # Rounded to the nearest, halves upwards, so that it never falls as rows_left grows.
            exact = rows_left * share
            taken = (2 * exact.numerator + exact.denominator) // (2 * exact.denominator)
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
