"""The checkpoints of a run that stay on disk."""

import dataclasses
import math
from collections.abc import Collection, Mapping


@dataclasses.dataclass(frozen=True)
class RetentionPolicy:
    """Retains the `last` checkpoints, every `every`-th step, and the `best` by the lowest `metric`.

    0 means none of a kind. A checkpoint stays if any of the three rules retains it.
    """

    last: int
    every: int = 0
    best: int = 0
    metric: str = "validation_loss"

    def retained(
        self, steps: Collection[int], metrics: Mapping[int, Mapping[str, float]]
    ) -> set[int]:
        """The `steps` that stay; `metrics` holds the metrics of some of them."""
        newest = sorted(steps)[-self.last :]
        permanent = [step for step in steps if self.every and step % self.every == 0]
        values = {step: metrics.get(step, {}).get(self.metric, math.nan) for step in steps}
        ranked = sorted((value, step) for step, value in values.items() if not math.isnan(value))
        best = [step for _, step in ranked[: self.best]]
        return {*newest, *permanent, *best}
