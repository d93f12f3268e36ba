"""Numbers that stay bad: when a run gives up, and how it goes back to before they were.

The compiled step skips what is bad by itself (`grok.train.bad_steps`); here is what the loop makes
of it.
"""

from collections.abc import Mapping, Sequence

import jax

from grok.errors import Diverged

Skipped = tuple[tuple[int, int], ...]  # first and last number of batches that were left out
SHOWN = 5


def is_bad_step(metrics: Mapping[str, jax.Array]) -> bool:
    """Whether the step of these metrics was bad; waits for it."""
    return bool(metrics["bad_in_a_row"])


def raise_if_diverged(
    step: int, metrics: Mapping[str, jax.Array], names: Sequence[str], limit: int
) -> None:
    """Raises Diverged when `limit` steps up to `step` were bad; waits for its metrics."""
    bad = int(metrics["bad_in_a_row"])
    if bad < limit:
        return
    to_blame = jax.device_get(metrics["bad_tensors"])
    blamed = [name for name, bad_one in zip(names, to_blame, strict=True) if bad_one]
    more = f" and {len(blamed) - SHOWN} more" if len(blamed) > SHOWN else ""
    where = f"in the gradients of {', '.join(blamed[:SHOWN])}{more}" if blamed else "in the loss"
    raise Diverged(
        f"the {bad} steps up to step {step} were bad (train.max_bad_steps={limit}), {where}, and "
        "changed nothing; an older checkpoint with a lower optimizer.peak_lr, or "
        "train.rollback_on_divergence=true, may get past them.",
        first=step - bad + 1,
        last=step,
    )


def batch_number(step: int, skipped: Skipped) -> int:
    """The number of the batch that comes after `step` steps."""
    return step + sum(last - first + 1 for first, last in skipped)


def rollback_step(steps: Sequence[int], error: Diverged, began: int, rolled_back: bool) -> int:
    """The checkpoint, of those of `steps`, to go back to: the newest from before the trouble.

    Where a return to `began` has led into trouble without a checkpoint in between, it was not good
    enough, and the one before it is taken. Raises `error` again when none is left.
    """
    good = [step for step in steps if step < error.first and not (rolled_back and step >= began)]
    newer = [step for step in steps if rolled_back and began < step < error.first]
    if not good and not newer:
        raise error
    return max(newer or good)


def skip_batches(before: Skipped, step: int, error: Diverged, skipped: Skipped) -> Skipped:
    """What a run leaves out that goes back from `error` to the checkpoint of `step`.

    `before`: what had been left out up to that checkpoint; `skipped`: up to the trouble.
    """
    first = batch_number(step, before)
    return (*before, (first, batch_number(error.last - 1, skipped)))
