"""A training run, which resumes bit for bit when started again. Its folder holds `config.yaml`
(resolved), `tokenizer.model`, `checkpoints/` and the files of `grok.train.telemetry.telemetry`."""

import dataclasses
import functools
import shlex
import time
from collections.abc import Callable
from contextlib import nullcontext

import jax
import optax
from jax.sharding import Mesh

from grok import compiler, distributed, sharding, storage
from grok.checkpoint.manager import Checkpoints
from grok.config import RunConfig, check_trainable
from grok.data.device_feed import global_batches
from grok.errors import DONE, SAVED, Diverged, SaveError, SilentCorruption
from grok.model.decoder import Decoder
from grok.model.mesh_fit import check_fits, check_matmul_dtype
from grok.optim.optimizer import make_optimizer
from grok.optim.param_groups import combine, names
from grok.preemption import PreemptionSignal
from grok.train.bad_steps import Skipped, batch_number, raise_if_diverged
from grok.train.checkpointing import (
    check_optimizer_unchanged,
    open_checkpoints,
    save,
    write_run_files,
)
from grok.train.finite import raise_if_not_finite
from grok.train.init_from import InitialWeights, initial_weights
from grok.train.loss import eval_step, validate
from grok.train.recovery import Start, from_newest, retry, roll_back
from grok.train.run_data import RunData, read_data
from grok.train.sdc import SdcCheck
from grok.train.state import TrainState, init_state
from grok.train.step import train_step
from grok.train.telemetry.run_manifest import describe_adapters, describe_run
from grok.train.telemetry.telemetry import Telemetry
from grok.train.watchdog import Watchdog

# Scores weights on tasks: numbers by the name of a metric.
ScoreTasks = Callable[[Decoder], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is ready to start."""

    config: RunConfig
    mesh: Mesh
    data: RunData
    optimizer: optax.GradientTransformation
    train_step: Callable  # jitted; donates the state
    eval_step: Callable  # jitted
    score_tasks: ScoreTasks | None  # None: train.eval_tasks names none
    sdc_check: SdcCheck | None  # None: train.sdc_check=off
    checkpoints: Checkpoints
    initial: InitialWeights | None  # of train.init_from; None: initialised from the seed
    telemetry: Telemetry
    watchdog: Watchdog
    first_step: int  # steps done in the checkpoint that this process resumes from
    last_step: int
    notices: tuple[str, ...]  # on the data, and defects of later checkpoints
    saves: bool  # False: writes no checkpoints


@dataclasses.dataclass(frozen=True)
class StartOptions:
    """The way to start a run, which its config does not say. replay_to: run only the steps up to
    that one and save nothing. resume_changed: accept a run whose optimizer keys have changed since
    its newest checkpoint. open_tasks: makes what scores weights on train.eval_tasks."""

    replay_to: int | None = None
    resume_changed: bool = False
    open_tasks: Callable[[RunConfig, Mesh], ScoreTasks] | None = None


def run_training(config: RunConfig, options: StartOptions = StartOptions()) -> int:
    """Trains as `config` says and returns the exit code: DONE, or SAVED when asked to stop."""
    lock = distributed.hold_folder(config.folder) if distributed.is_primary() else nullcontext()
    with lock, Watchdog(config.train, config.folder) as watchdog:
        run = open_run(config, options, watchdog)
        with jax.set_mesh(run.mesh), PreemptionSignal(run.mesh) as preemption, run.telemetry:
            with run.telemetry.events.during("start"):
                start = first_state(run)
            step = None
            while step is None:
                try:
                    step = train_steps(run, start, preemption)
                except Diverged as error:
                    start = roll_back(run, start, error)
                except SilentCorruption as error:
                    start = retry(run, start, error)
            watchdog.rest()
            with run.telemetry.events.during("save"):
                run.checkpoints.close()
            return finish(run, step)


def open_run(config: RunConfig, options: StartOptions, watchdog: Watchdog) -> Run:
    """Opens devices, data and files, so that every mistake is found before anything compiles."""
    began, replay_to, open_tasks = time.time(), options.replay_to, options.open_tasks
    check_trainable(config)
    check_matmul_dtype(config.model, jax.devices()[0].device_kind)
    sizes = check_fits(config, jax.device_count())
    mesh = sharding.make_mesh(sizes["data"], sizes["expert"], sizes["tensor"], sizes["slice"])
    data = read_data(config)
    optimizer = make_optimizer(config)
    step = functools.partial(train_step, config=config, optimizer=optimizer)
    checkpoints = open_checkpoints(config)
    notices: list[str] = []
    first_step = checkpoints.newest_good(notices.append) or 0
    if first_step and not options.resume_changed:
        check_optimizer_unchanged(checkpoints, first_step, config)
    return Run(
        config=config,
        mesh=mesh,
        data=data,
        optimizer=optimizer,
        train_step=compiler.jit(step, donate_argnums=0),
        eval_step=compiler.jit(eval_step),
        score_tasks=open_tasks(config, mesh) if open_tasks and config.train.eval_tasks else None,
        sdc_check=None if config.train.sdc_check == "off" else SdcCheck(config.train, mesh),
        checkpoints=checkpoints,
        initial=initial_weights(config, checkpoints),
        telemetry=Telemetry(config, mesh, data, first_step, began),
        watchdog=watchdog,
        first_step=first_step,
        last_step=config.train.steps if replay_to is None else replay_to,
        notices=(*data.notices, *notices),
        saves=replay_to is None,
    )


def first_state(run: Run) -> Start:
    """Returns the newest checkpoint's state, or a fresh one; writes config and tokenizer."""
    log = run.telemetry.log
    log(f"run folder: {run.config.folder}")
    log(describe_run(run.config, run.mesh))
    if adapters := describe_adapters(run.config):
        log(adapters)
    for notice in run.notices:
        log(notice)
    if run.first_step:
        start = from_newest(run, run.first_step)
    else:
        model = None
        if run.initial is not None:
            log(f"reading the weights at {run.initial.identity['path']}")
            model = run.initial.load(run.mesh)
        log("making the initial state")
        start = Start(0, init_state(run.config, run.optimizer, run.mesh, model))
    write_run_files(run.config, run.data.template, is_new=not run.first_step)
    return start


def train_steps(run: Run, start: Start, preemption: PreemptionSignal) -> int:
    """Steps, reports, validates and saves, to the last step or until asked to stop. Returns the
    last step done, which is saved. Raises Diverged after too many bad steps, and SilentCorruption
    where devices differ."""
    config, telemetry = run.config, run.telemetry
    limit, tensors = config.train.max_bad_steps, names(start.state.model)
    check = functools.partial(raise_if_diverged, names=tensors, limit=limit)
    telemetry.resumed(start.step)
    step, saved_step, state = start.step, start.step, start.state
    numbers = range(*(batch_number(number, start.skipped) for number in (step, run.last_step)))
    batches = global_batches(run.data.train, run.mesh, numbers, config.data.prefetch)
    metrics: dict[str, jax.Array] = {}
    save_due = False
    while step < run.last_step:
        previous_metrics = metrics
        with telemetry.waiting():
            batch = next(batches)
        step += 1
        preemption.exchange(run.checkpoints.saving())
        # The device feed has moved the batch: nothing is transferred implicitly from here.
        with telemetry.step(step, batch) as dispatch, jax.transfer_guard("disallow"):
            if dispatch.is_first_of_shape:
                distributed.compile_in_lockstep(run.train_step, state, batch)
            state, metrics = dispatch.outputs = run.train_step(state, batch)
        telemetry.advance(step, saved_step if run.checkpoints.saving() else None)
        # The host looks at the step before the one just dispatched: neither waits for the other.
        if previous_metrics:
            check(step - 1, previous_metrics)
        run.watchdog.heartbeat(step - 1)
        is_last = step == run.last_step
        if is_last or step % config.train.log_every == 0:
            log_step(run, step, metrics, start.skipped)
        losses: dict[str, float] = {}
        if is_last or (config.train.eval_every and step % config.train.eval_every == 0):
            losses = validation_losses(run, step, state)
        every = config.checkpoint.every
        is_due = step % every == 0 if every else not preemption.is_any_saving()
        save_due = save_due or is_due
        if is_last:
            check(step, metrics)
        # A checkpoint on the way is of a good step: one to roll back to.
        is_saving = run.saves and (is_last or (save_due and not metrics["bad_in_a_row"]))
        if is_saving or step % config.train.sdc_check_every == 0:
            compare_devices(run, step, state, batch)
        if is_saving:
            last_good = step - int(metrics["bad_in_a_row"])
            raise_if_not_finite(step, last_good, state, losses if is_last else {})
            save_state(run, step, state, losses, start.skipped, is_last)
            saved_step, save_due = step, False
        if preemption.should_stop():
            break
    if run.saves and saved_step != step:
        check(step, metrics)
        compare_devices(run, step, state, batch)
        raise_if_not_finite(step, step - int(metrics["bad_in_a_row"]), state)
        save_state(run, step, state, {}, start.skipped, is_last=True)
    return step


def compare_devices(run: Run, step: int, state: TrainState, batch: dict) -> None:
    """Raises SilentCorruption where devices differ after `step`, if the config asks for that."""
    if run.sdc_check is not None:
        with run.telemetry.events.during("sdc_check", step=step):
            run.sdc_check.check(step, state, batch)


def log_step(run: Run, step: int, metrics: dict[str, jax.Array], skipped: Skipped) -> None:
    """Waits for the step's metrics, writes and shows them; skipped batches count as seen."""
    tokens_seen = run.data.train.tokens_seen(batch_number(step, skipped))
    shown = {name: value for name, value in metrics.items() if name != "bad_tensors"}
    run.telemetry.log_metrics(step, shown, tokens_seen=tokens_seen)


def validation_losses(run: Run, step: int, state: TrainState) -> dict[str, float]:
    """Runs and reports a validation pass, if there is data, also of averaged weights, and scores
    the tasks; returns the losses."""
    losses, scores = {}, {}
    with run.telemetry.events.during("validate", step=step):
        losses = held_out_losses(run, state.model)
        if state.ema is not None:
            ema_losses = held_out_losses(run, combine(state.ema, state.model))
            losses |= {f"ema_{name}": value for name, value in ema_losses.items()}
        if run.score_tasks is not None:
            scores = run.score_tasks(state.model)
    if losses or scores:
        run.telemetry.log_validation(step, losses | scores)
    return losses


def held_out_losses(run: Run, model: Decoder) -> dict[str, float]:
    """Losses of a model on the validation data and on each domain, by the name of the metric."""
    data, losses = run.data, {}
    if data.validation is not None:
        losses = validate(run.eval_step, model, data.validation, data.num_bytes, run.mesh)
    for name, held_out in data.domains.items():
        domain = validate(run.eval_step, model, *held_out, run.mesh)
        losses |= {f"{metric}/{name}": value for metric, value in domain.items()}
    return losses


def save_state(
    run: Run, step: int, state: TrainState, losses: dict, skipped: Skipped, is_last: bool
) -> None:
    """Starts a save, which continues in the background. A failed save is reported, and the run goes
    on: older checkpoints are intact, and the next save may work; where none follows, it ends the
    run. With several hosts it ends all: the others wait for this one in the midst of a save."""
    begin = functools.partial(save, run, step, state, losses, skipped)
    with run.telemetry.events.during("save", step=step):
        for phase in (run.checkpoints.wait, begin):
            try:
                phase()
            except SaveError as error:
                if distributed.process_count() > 1 or (is_last and phase is begin):
                    raise
                run.telemetry.log(str(error))
    run.telemetry.saved(step)


def finish(run: Run, step: int) -> int:
    """Logs how the run ended after `step`; returns the exit code."""
    code = SAVED if step < run.last_step else DONE
    if code == SAVED:
        again = f"`grok train {shlex.quote(run.config.folder)}`"
        if storage.is_remote(run.config.folder) or distributed.process_count() > 1:
            again = "the same command"
        run.telemetry.log(f"stopped at step {step}, all saved; {again} goes on from there")
    elif run.saves:
        run.telemetry.log(f"done: {step} steps, in {run.config.folder}")
    run.telemetry.ended(step, code)
    return code
