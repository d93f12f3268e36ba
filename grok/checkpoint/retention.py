"""The checkpoints that a run retains."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class RetentionPolicy:
    """Retains the `last` checkpoints, every `every`-th step, and the `best` by the lowest `metric`.
    0 means none of a kind. A checkpoint stays if any of the three rules retains it."""

    last: int
    every: int = 0
    best: int = 0
    metric: str = "validation_loss"

    # Of each step that has some; grows while a run saves.
    metrics: dict[int, Mapping[str, float]] = dataclasses.field(default_factory=dict)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        """Tells Orbax for each of the checkpoints whether it stays."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        newest = sorted(steps)[-self.last :]
        permanent = [step for step in steps if self.every and step % self.every == 0]
        values = {step: self.metrics.get(step, {}).get(self.metric, math.nan) for step in steps}
        ranked = sorted((value, step) for step, value in values.items() if not math.isnan(value))
        best = [step for _, step in ranked[: self.best]]
        return [step in {*newest, *permanent, *best} for step in steps]
