"""The shape of every step's batch, and which rows of the data it is made of.

Rows are laid out as long as the longest of the run and numbered through it. A batch of shorter rows
is whole long rows, each cut into equal parts, so that no change of shape loses a token or has one
twice.

B rows of a batch, T tokens of a row; R rows laid out, S tokens of each, k = S / T parts of each.
"""

import bisect
from collections.abc import Sequence

import numpy as np

Batch = dict[str, np.ndarray]


class BatchSchedule:
    """Shapes by step; what may change at a step is B, T, or both."""

    def __init__(
        self, sequence_length: int, batch_size: int, changes: Sequence[tuple[int, int, int]] = ()
    ) -> None:
        """Begin with `batch_size` rows of `sequence_length` tokens, which rows are laid out in.

        Each of `changes` is a first step (they increase), and B and T from there on: T divides
        `sequence_length`, and the number of parts divides B.
        """
        self.sequence_length = sequence_length
        self._first_steps = [0]
        self._stages = [(0, batch_size, sequence_length)]  # first row, B, T
        for first_step, rows, length in changes:
            stage = self.first_row(first_step), rows, length
            self._first_steps.append(first_step)
            self._stages.append(stage)

    def shape(self, step: int) -> tuple[int, int]:
        """B and T of the batch of `step`."""
        _, rows, length = self._stages[self._stage(step)]
        return rows, length

    def first_row(self, step: int) -> int:
        """How many laid out rows all batches before `step` are made of."""
        stage = self._stage(step)
        before, rows, length = self._stages[stage]
        steps = step - self._first_steps[stage]
        return before + steps * (rows * length // self.sequence_length)

    def rows(self, step: int, wanted: slice) -> range:
        """The laid out rows that hold rows `wanted` of the batch of `step`."""
        rows, length = self.shape(step)
        parts = self.sequence_length // length
        start, stop, _ = wanted.indices(rows)
        first = self.first_row(step)
        return range(first + start // parts, first - (-stop // parts))

    def cut(self, step: int, wanted: slice, whole: Batch) -> Batch:
        """Rows `wanted` of the batch of `step`, out of `whole`: the rows that `rows` says,
        [R, S] each."""
        rows, length = self.shape(step)
        parts = self.sequence_length // length
        if parts == 1:
            return whole
        start, stop, _ = wanted.indices(rows)
        inside = slice(start % parts, start % parts + stop - start)
        batch = {name: a.reshape(-1, length)[inside] for name, a in whole.items()}
        if "segment_ids_BT" in batch:
            _number_anew(batch)
        return batch

    def _stage(self, step: int) -> int:
        return bisect.bisect_right(self._first_steps, step) - 1


def _number_anew(batch: Batch) -> None:
    """Segments from 1 in each row, and positions from 0 in the segment that a cut went through."""
    segments_BT, positions_BT = batch["segment_ids_BT"], batch["positions_BT"]
    first_B1 = segments_BT[:, :1]
    goes_on_BT = segments_BT == first_B1
    batch["positions_BT"] = positions_BT - np.where(goes_on_BT, positions_BT[:, :1], 0)
    batch["segment_ids_BT"] = np.where(segments_BT > 0, segments_BT - first_B1 + 1, 0)
