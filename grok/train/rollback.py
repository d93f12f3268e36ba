"""Divergence: when a run gives up, and to which checkpoint it is rolled back.

The compiled step skips bad steps by itself (`grok.train.bad_steps`); these are the loop's decisions
when there are many in a row.
"""

from collections.abc import Mapping, Sequence

import jax

from grok.errors import Diverged

Skipped = tuple[tuple[int, int], ...]  # first and last number of each range of skipped batches
MAX_NAMES = 5  # tensors that a message lists


def is_bad_step(metrics: Mapping[str, jax.Array]) -> bool:
    """Waits for a step's metrics; returns whether it was bad."""
    return bool(metrics["bad_in_a_row"])


def raise_if_diverged(
    step: int, metrics: Mapping[str, jax.Array], names: Sequence[str], limit: int
) -> None:
    """Waits for the metrics of `step`; raises Diverged when the last `limit` steps were bad."""
    num_bad = int(metrics["bad_in_a_row"])
    if num_bad < limit:
        return
    to_blame = jax.device_get(metrics["bad_tensors"])
    blamed = [name for name, is_bad in zip(names, to_blame, strict=True) if is_bad]
    more = f" and {len(blamed) - MAX_NAMES} more" if len(blamed) > MAX_NAMES else ""
    cause = f"the gradients of {', '.join(blamed[:MAX_NAMES])}{more}" if blamed else "the loss"
    raise Diverged(
        f"the {num_bad} steps up to step {step} were bad (train.max_bad_steps={limit}), in "
        f"{cause}, and changed nothing; an older checkpoint with a lower optimizer.peak_lr, or "
        "train.rollback_on_divergence=true, may get past them.",
        first=step - num_bad + 1,
        last=step,
    )


def batch_number(step: int, skipped: Skipped) -> int:
    """Number of the batch that follows after `step` steps."""
    return step + sum(last - first + 1 for first, last in skipped)


def rollback_step(steps: Sequence[int], error: Diverged, began: int, rolled_back: bool) -> int:
    """Returns the newest of the checkpoints of `steps` from before the bad steps.

    If the run was `rolled_back` to step `began` and then diverged without a new checkpoint, that
    one was not good enough, and the one before it is taken. Raises `error` when none is left.
    """
    good = [step for step in steps if step < error.first]
    newer = [step for step in good if rolled_back and step > began]
    older = [step for step in good if not rolled_back or step < began]
    if not newer and not older:
        raise error
    return max(newer or older)


def skip_batches(before: Skipped, step: int, error: Diverged, skipped: Skipped) -> Skipped:
    """The batches to skip after a rollback from `error` to the checkpoint of `step`, up to which
    `before` had been skipped; `skipped`: those up to the bad steps."""
    first = batch_number(step, before)
    return (*before, (first, batch_number(error.last - 1, skipped)))
