"""A run's way back: the state that it starts from, and that of an earlier checkpoint."""

from typing import TYPE_CHECKING, NamedTuple

from grok.errors import DamageError, Diverged, SilentCorruption
from grok.train import bad_steps
from grok.train.bad_steps import Skipped
from grok.train.checkpointing import restore
from grok.train.state import TrainState

if TYPE_CHECKING:
    from grok.train.loop import Run


class Start(NamedTuple):
    """The point at which the steps begin."""

    step: int  # steps done
    state: TrainState
    skipped: Skipped = ()  # batches skipped before
    rolled_back: bool = False  # True: the run was rolled back to here
    is_retry: bool = False  # True: devices differed after steps from here


def from_newest(run: "Run", step: int) -> Start:
    """Restores the checkpoint of `step`, the newest, or the newest before it that is as it was
    saved."""
    while True:
        run.telemetry.log(f"resuming from the checkpoint of step {step}")
        try:
            return from_checkpoint(run, step)
        except DamageError as error:
            step = run.checkpoints.set_aside(step, error, run.telemetry.log)
            run.telemetry.back_to(step)


def from_checkpoint(run: "Run", step: int) -> Start:
    """Restores the checkpoint of `step`; logs the config keys that have changed since."""
    with run.telemetry.events.during("restore", step=step):
        state, skipped, changes = restore(run, step)
    for change in changes:
        run.telemetry.log(f"changed since then: {change}")
    return Start(step, state, skipped)


def roll_back(run: "Run", start: Start, error: Diverged) -> Start:
    """Restores the last good checkpoint and skips the batches from there up to the bad ones. Raises
    `error` again where the config does not ask for that, or no such checkpoint is left."""
    run.watchdog.starting("a step after the rollback")
    run.checkpoints.wait()
    if not (run.config.train.rollback_on_divergence and run.saves):
        raise error
    good = None
    while good is None:
        saved = run.checkpoints.steps()
        step = bad_steps.rollback_step(saved, error, start.step, start.rolled_back)
        try:
            good = from_checkpoint(run, step)
        except DamageError as damage:
            run.checkpoints.set_aside(step, damage, run.telemetry.log)
    run.checkpoints.delete_after(step)
    skipped = bad_steps.skip_batches(good.skipped, step, error, start.skipped)
    first, last = skipped[-1]
    run.telemetry.rolled_back(step, skipped_batches=[first, last], reason=str(error))
    resumed = f"Back to the checkpoint of step {step}, and on without batches {first} to {last}."
    run.telemetry.log(f"{error} {resumed}")
    return Start(step, good.state, skipped, rolled_back=True)


def retry(run: "Run", start: Start, error: SilentCorruption) -> Start:
    """Restores the newest checkpoint, whose state passed the SDC check. Raises `error` again where
    the config does not ask for that, there is none, or devices differed again before another."""
    run.watchdog.starting("a step after the rollback")
    run.checkpoints.wait()
    saved = run.checkpoints.steps() if run.saves else []
    is_again = start.is_retry and saved[-1:] <= [start.step]
    if run.config.train.sdc_check != "rollback" or not saved or is_again:
        raise error
    good = from_newest(run, saved[-1])
    run.telemetry.rolled_back(good.step, reason=str(error))
    run.telemetry.log(f"{error} Back to the checkpoint of step {good.step}.")
    return good._replace(is_retry=True)
