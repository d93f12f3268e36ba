"""A training run, top to bottom.

In the run's folder: `config.yaml` (resolved), `tokenizer.model`, `checkpoints/`, and what
`grok.train.telemetry.telemetry` tells: `metrics.jsonl`, `events.jsonl`, `run.json`.
Started again with the same command, a run goes on from its newest checkpoint, bit for bit as if
it had never stopped.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh

from grok import distributed, sharding
from grok.checkpoint.manager import Checkpoints
from grok.config import RunConfig, check_fits, check_trainable
from grok.config.text import to_yaml
from grok.data.batch_schedule import Batch
from grok.data.device_feed import global_batches
from grok.data.text_stream import bits_per_byte
from grok.errors import DONE, SAVED, Diverged, SaveError
from grok.optim.optimizer import make_optimizer
from grok.optim.param_groups import combine, names
from grok.preemption import PreemptionSignal
from grok.storage import join
from grok.train.checkpointing import restore, retention_policy, save, skipped_batches
from grok.train.evaluate import total_loss
from grok.train.init_from import InitialWeights, initial_weights
from grok.train.rollback import (
    Skipped,
    batch_number,
    is_bad_step,
    raise_if_diverged,
    rollback_step,
    skip_batches,
)
from grok.train.run_data import RunData, read_data
from grok.train.state import TrainState, init_state
from grok.train.step import eval_step, train_step
from grok.train.telemetry.run_dir import write_file
from grok.train.telemetry.telemetry import Telemetry
from grok.train.watchdog import Watchdog


class Start(NamedTuple):
    """Where the steps begin: after how many, with which state, which batches having been left out
    before; `returned`: whether the run went back to here."""

    step: int
    state: TrainState
    skipped: Skipped = ()
    returned: bool = False


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run: what it works with, and what it reports through."""

    config: RunConfig
    mesh: Mesh
    data: RunData
    optimizer: optax.GradientTransformation
    step_function: Callable  # train_step, compiled when it first runs
    eval_function: Callable
    checkpoints: Checkpoints
    initial: InitialWeights | None  # what the parameters started from, if not from the seed
    telemetry: Telemetry
    watchdog: Watchdog
    first: int  # the step that this process goes on from
    notices: tuple[str, ...]  # what was found wrong with later checkpoints
    last: int  # and the one that it ends with
    saves: bool  # whether it saves checkpoints


def run(config: RunConfig, replay_to: int | None = None) -> int:
    """Trains as `config` says and returns the exit code: DONE, or SAVED when asked to stop.

    With `replay_to` only the steps up to that one are done, and nothing is saved.
    """
    parts = open_run(config, replay_to)
    with (
        jax.set_mesh(parts.mesh),
        PreemptionSignal(parts.mesh) as stop,
        parts.telemetry as telemetry,
    ):
        with telemetry.events.during("start"):
            start = first_state(parts)
        with parts.watchdog:
            step = train_on(parts, start, stop)
        with telemetry.events.during("save"):
            parts.checkpoints.close()
        return finish(parts, step)


def open_run(config: RunConfig, replay_to: int | None) -> Run:
    """Devices, data and files: everything that can be wrong is found before anything compiles."""
    began = time.time()
    check_trainable(config)
    sizes = check_fits(config, jax.device_count())
    mesh = sharding.make_mesh(sizes["data"], sizes["expert"], sizes["tensor"], sizes["slice"])
    data = read_data(config)
    optimizer = make_optimizer(config)
    step = functools.partial(train_step, config=config, optimizer=optimizer)
    checkpoints = Checkpoints(join(config.folder, "checkpoints"), keep=retention_policy(config))
    notices: list[str] = []
    first = checkpoints.newest_good(notices.append) or 0
    return Run(
        config=config,
        mesh=mesh,
        data=data,
        optimizer=optimizer,
        step_function=jax.jit(step, donate_argnums=0),
        eval_function=jax.jit(eval_step),
        checkpoints=checkpoints,
        initial=initial_weights(config, checkpoints),
        telemetry=Telemetry(config, mesh, data, first, began),
        watchdog=Watchdog(config.train.hang_timeout_seconds, config.folder),
        first=first,
        notices=tuple(notices),
        last=config.train.steps if replay_to is None else replay_to,
        saves=replay_to is None,
    )


def first_state(run: Run) -> Start:
    """Where the run begins: at the newest checkpoint, or with a fresh state."""
    log = run.telemetry.log
    log(describe(run.config, run.mesh))
    for notice in run.notices:
        log(notice)
    if run.first:
        log(f"resuming from the checkpoint of step {run.first}")
        start = from_checkpoint(run, run.first)
    else:
        model = None
        if run.initial is not None:
            log(f"reading the weights at {run.initial.identity['path']}")
            model = run.initial.load(run.mesh)
        log("making the initial state")
        start = Start(0, init_state(run.config, run.optimizer, run.mesh, model))
    if distributed.is_primary():
        write_file(run.config.folder, "config.yaml", to_yaml(run.config).encode())
        if not run.first:
            tokenizer = Path(run.config.data.tokenizer).read_bytes()
            write_file(run.config.folder, "tokenizer.model", tokenizer)
    return start


def from_checkpoint(run: Run, step: int) -> Start:
    """The state saved at `step`; says what the config says differently now."""
    with run.telemetry.events.during("restore", step=step):
        state, changes = restore(
            run.checkpoints, step, run.config, run.data, run.optimizer, run.mesh, run.initial
        )
    for change in changes:
        run.telemetry.log(f"changed since then: {change}")
    return Start(step, state, skipped_batches(run.checkpoints, step))


def train_on(run: Run, start: Start, stop: PreemptionSignal) -> int:
    """`train`; where the config says so, a run whose numbers stay bad goes back and on."""
    while True:
        try:
            return train(run, start, stop)
        except Diverged as error:
            run.watchdog.pause()
            run.checkpoints.wait()
            if not (run.config.train.rollback_on_divergence and run.saves):
                raise
            start = roll_back(run, start, error)


def roll_back(run: Run, start: Start, error: Diverged) -> Start:
    """The last good checkpoint, from which the run leaves out the batches up to the bad ones.

    Raises `error` again where there is none.
    """
    step = rollback_step(run.checkpoints.steps(), error, start.step, start.returned)
    run.checkpoints.delete_after(step)
    good = from_checkpoint(run, step)
    skipped = skip_batches(good.skipped, step, error, start.skipped)
    first, last = skipped[-1]
    run.telemetry.returned(step, skipped_batches=[first, last], reason=str(error))
    run.telemetry.log(
        f"{error} Back to the checkpoint of step {step}, and on without batches {first} to {last}."
    )
    return Start(step, good.state, skipped, returned=True)


def train(run: Run, start: Start, stop: PreemptionSignal) -> int:
    """Steps, reports, validations and saves, to the last step or until asked to stop.

    Returns the last step done, which is saved. Raises Diverged after too many bad steps.
    """
    config, telemetry = run.config, run.telemetry
    tensors, limit = names(start.state.model), config.train.max_bad_steps
    telemetry.began(start.step)
    step = saved = start.step
    state = start.state
    batches = training_batches(run, start)
    metrics: dict[str, jax.Array] = {}
    save_due = False
    while step < run.last:
        before = metrics
        with telemetry.events.waiting():
            batch = next(batches)
        step += 1
        stop.exchange()
        state, metrics = telemetry.run_step(step, run.step_function, state, batch)
        telemetry.advance(step, saved if run.checkpoints.saving() else None)
        # Devices have this step when the host looks at the one before: none waits for the other.
        if before:
            raise_if_diverged(step - 1, before, tensors, limit)
        run.watchdog.heartbeat(step - 1)
        last = step == run.last
        if last or step % config.train.log_every == 0:
            report_step(run, step, metrics, start.skipped)
        validated: dict[str, float] = {}
        if last or (config.train.eval_every and step % config.train.eval_every == 0):
            validated = report_validation(run, step, state)
        save_due = save_due or step % config.checkpoint.every == 0
        if last:
            raise_if_diverged(step, metrics, tensors, limit)
        # What is saved on the way comes from a good step: one to go back to.
        if run.saves and (last or (save_due and not is_bad_step(metrics))):
            save_state(run, step, state, validated, start.skipped)
            saved, save_due = step, False
        if stop.should_stop():
            break
    if run.saves and saved != step:
        raise_if_diverged(step, metrics, tensors, limit)
        save_state(run, step, state, {}, start.skipped)
    return step


def training_batches(run: Run, start: Start) -> Iterator[dict[str, jax.Array]]:
    """The batches of all steps that remain."""
    first, last = (batch_number(step, start.skipped) for step in (start.step, run.last))
    return global_batches(run.data.train, run.mesh, range(first, last), run.config.data.prefetch)


def report_step(run: Run, step: int, metrics: dict[str, jax.Array], skipped: Skipped) -> None:
    """Waits for the step's metrics, and writes and shows them; tokens of batches that were left
    out count as seen."""
    told = {name: value for name, value in metrics.items() if name != "bad_tensors"}
    run.telemetry.step(
        step, told, tokens_seen=run.data.train.tokens_seen(batch_number(step, skipped))
    )


def report_validation(run: Run, step: int, state: TrainState) -> dict[str, float]:
    """A validation pass, where there is data for one, and a second with the averaged weights; what
    was measured."""
    if run.data.validation is None:
        return {}
    against = (run.data.validation, run.data.num_bytes, run.mesh)
    with run.telemetry.events.during("validate", step=step):
        values = validate(run.eval_function, state.model, *against)
        if state.ema is not None:
            averaged = validate(run.eval_function, combine(state.ema, state.model), *against)
            values |= {f"ema_{name}": value for name, value in averaged.items()}
    run.telemetry.validation(step, values)
    return values


def validate(
    eval_function, model, batches: Iterable[Batch], num_bytes: int | None, mesh
) -> dict[str, float]:
    """Loss of a validation pass in nats a token, and in bits per byte where bytes are known."""
    nats, num_tokens = total_loss(eval_function, model, batches, mesh)
    values = {"validation_loss": nats / num_tokens}
    if num_bytes is not None:
        values["validation_bits_per_byte"] = bits_per_byte(nats, num_bytes)
    return values


def save_state(
    run: Run, step: int, state: TrainState, validated: dict[str, float], skipped: Skipped
) -> None:
    """Starts a save, which goes on in the background.

    One that fails is reported, and the run goes on: older checkpoints are whole, and the next save
    may work. Of several hosts it ends all: the others wait for this one in the midst of the save.
    """

    def begin() -> None:
        save(run.checkpoints, step, state, run.config, run.data, run.initial, validated, skipped)

    with run.telemetry.events.during("save", step=step):
        for part in (run.checkpoints.wait, begin):
            try:
                part()
            except SaveError as error:
                if distributed.process_count() > 1:
                    raise
                run.telemetry.log(str(error))
    run.telemetry.saved(step)


def finish(run: Run, step: int) -> int:
    """Says how the run ended at `step`; the exit code."""
    if step < run.last:
        run.telemetry.log(f"stopped at step {step}, all saved; the same command goes on from there")
        code = SAVED
    else:
        if run.saves:
            run.telemetry.log(f"done: {step} steps, in {run.config.folder}")
        code = DONE
    run.telemetry.ended(step, code)
    return code


def describe(config: RunConfig, mesh: Mesh) -> str:
    """One line: model, mesh, batch."""
    model, data = config.model, config.data
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    shapes = f"{data.batch_size} rows of {data.sequence_length} tokens a step"
    for step, batch_size, length in data.shapes()[1:]:
        shapes += f", {batch_size} of {length} from step {step}"
    return (
        f"{model.num_parameters():,} parameters ({model.num_active_parameters():,} a token) on "
        f"mesh {axes}; {shapes}"
    )
