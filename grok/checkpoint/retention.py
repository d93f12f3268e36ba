"""Which checkpoints of a run stay on disk."""

import dataclasses
import math
from collections.abc import Collection, Mapping


@dataclasses.dataclass(frozen=True)
class RetentionPolicy:
    """The `last` ones, those of every `every`-th step, and the `best` ones by the lowest `metric`;
    0 for none of a kind. What is kept for one reason need not be for another."""

    last: int
    every: int = 0
    best: int = 0
    metric: str = "validation_loss"

    def staying(
        self, steps: Collection[int], metrics: Mapping[int, Mapping[str, float]]
    ) -> set[int]:
        """Those of `steps` that stay; `metrics` holds what is known of some of them."""
        newest = sorted(steps)[-self.last :]
        for_ever = [step for step in steps if self.every and step % self.every == 0]
        values = {step: metrics.get(step, {}).get(self.metric, math.nan) for step in steps}
        ranked = sorted((value, step) for step, value in values.items() if not math.isnan(value))
        best = [step for _, step in ranked[: self.best]]
        return {*newest, *for_ever, *best}
