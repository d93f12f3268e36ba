"""A training run, top to bottom.

In the run's folder: `config.yaml` (resolved), `tokenizer.model`, `checkpoints/`, and what
`grok.train.reports` tells: `metrics.jsonl`, `events.jsonl`, `run.json`.
Started again with the same command, a run goes on from its newest checkpoint, bit for bit as if
it had never stopped.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import optax
from jax.sharding import Mesh

from grok import sharding
from grok.checkpoint.manager import Checkpoints
from grok.config import RunConfig, check_fits
from grok.config_text import to_yaml
from grok.data.pipeline import global_batches
from grok.data.shapes import Batch
from grok.data.text import bits_per_byte
from grok.errors import DONE, SAVED, ConfigError, SaveError
from grok.storage import join
from grok.train import hosts
from grok.train.data import RunData, read_data
from grok.train.folder import write_file
from grok.train.groups import merge
from grok.train.initial import InitialWeights, initial_weights
from grok.train.optimizer import make_optimizer
from grok.train.reports import Reports
from grok.train.saved import keep_policy, restore, save
from grok.train.state import TrainState, init_state
from grok.train.step import eval_step, train_step
from grok.train.stop import StopRequest
from grok.train.validation import total_loss
from grok.train.watchdog import Watchdog


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
    reports: Reports
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
    with jax.set_mesh(parts.mesh), StopRequest(parts.mesh) as stop, parts.reports as reports:
        with reports.events.during("start"):
            state = first_state(parts)
        with parts.watchdog:
            step = train(parts, state, stop)
        with reports.events.during("save"):
            parts.checkpoints.close()
        return farewell(parts, step)


def open_run(config: RunConfig, replay_to: int | None) -> Run:
    """Devices, data and files: everything that can be wrong is found before anything compiles."""
    began = time.time()
    if config.model.param_dtype == "int8":
        raise ConfigError(
            "model.param_dtype=int8 is for inference, and int8 matrices have no gradient; "
            "model.param_dtype=float32 would work."
        )
    sizes = check_fits(config, jax.device_count())
    mesh = sharding.make_mesh(sizes["data"], sizes["expert"], sizes["tensor"], sizes["slice"])
    data = read_data(config)
    optimizer = make_optimizer(config)
    step = functools.partial(train_step, config=config, optimizer=optimizer)
    checkpoints = Checkpoints(join(config.folder, "checkpoints"), keep=keep_policy(config))
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
        reports=Reports(config, mesh, data, first, began),
        watchdog=Watchdog(config.train.hang_seconds, config.folder),
        first=first,
        notices=tuple(notices),
        last=config.train.steps if replay_to is None else replay_to,
        saves=replay_to is None,
    )


def first_state(run: Run) -> TrainState:
    """The state of the newest checkpoint, or a fresh one."""
    say = run.reports.say
    say(describe(run.config, run.mesh))
    for notice in run.notices:
        say(notice)
    if run.first:
        say(f"resuming from the checkpoint of step {run.first}")
        with run.reports.events.during("restore", step=run.first):
            state, changes = restore(
                run.checkpoints,
                run.first,
                run.config,
                run.data,
                run.optimizer,
                run.mesh,
                run.initial,
            )
        for change in changes:
            say(f"changed since then: {change}")
    else:
        model = None
        if run.initial is not None:
            say(f"reading the weights at {run.initial.identity['path']}")
            model = run.initial.load(run.mesh)
        say("making the initial state")
        state = init_state(run.config, run.optimizer, run.mesh, model)
    if hosts.is_first():
        write_file(run.config.folder, "config.yaml", to_yaml(run.config).encode())
        if not run.first:
            tokenizer = Path(run.config.data.tokenizer).read_bytes()
            write_file(run.config.folder, "tokenizer.model", tokenizer)
    return state


def train(run: Run, state: TrainState, stop: StopRequest) -> int:
    """Steps, reports, validations and saves, to the last step or until asked to stop.

    Returns the last step done, which is saved.
    """
    config, reports = run.config, run.reports
    reports.began(run.first)
    step = saved = run.first
    batches = training_batches(run)
    metrics: dict[str, jax.Array] = {}
    while step < run.last:
        before = metrics
        with reports.events.waiting():
            batch = next(batches)
        step += 1
        stop.vote()
        state, metrics = reports.run_step(step, run.step_function, state, batch)
        reports.display.advance(step, saved if run.checkpoints.saving() else None)
        # Devices have this step when the host looks at the one before: none waits for the other.
        if before:
            jax.block_until_ready(before)
        run.watchdog.beat(step - 1)
        last = step == run.last
        if last or step % config.train.log_every == 0:
            report_step(run, step, metrics)
        validated: dict[str, float] = {}
        if last or (config.train.eval_every and step % config.train.eval_every == 0):
            validated = report_validation(run, step, state)
        if run.saves and (last or step % config.checkpoint.every == 0):
            save_state(run, step, state, validated)
            saved = step
        if stop.agreed():
            break
    if run.saves and saved != step:
        save_state(run, step, state, {})
    return step


def training_batches(run: Run) -> Iterator[dict[str, jax.Array]]:
    """The batches of all steps that remain."""
    steps = range(run.first, run.last)
    return global_batches(run.data.train, run.mesh, steps, run.config.data.prefetch)


def report_step(run: Run, step: int, metrics: dict[str, jax.Array]) -> None:
    """Waits for the step's metrics, and writes and shows them."""
    told = {name: value for name, value in metrics.items() if name != "bad_tensors"}
    run.reports.step(step, told, tokens_seen=run.data.train.tokens_seen(step))


def report_validation(run: Run, step: int, state: TrainState) -> dict[str, float]:
    """A validation pass, where there is data for one, and a second with the averaged weights; what
    was measured."""
    if run.data.validation is None:
        return {}
    against = (run.data.validation, run.data.num_bytes, run.mesh)
    with run.reports.events.during("validate", step=step):
        values = validate(run.eval_function, state.model, *against)
        if state.ema is not None:
            averaged = validate(run.eval_function, merge(state.ema, state.model), *against)
            values |= {f"ema_{name}": value for name, value in averaged.items()}
    run.reports.validation(step, values)
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


def save_state(run: Run, step: int, state: TrainState, validated: dict[str, float]) -> None:
    """Starts a save, which goes on in the background. One that fails is reported, and the run goes
    on: older checkpoints are whole, and the next save may work."""
    with run.reports.events.during("save", step=step):
        try:
            run.checkpoints.wait()
        except SaveError as error:
            run.reports.say(str(error))
        try:
            save(run.checkpoints, step, state, run.config, run.data, run.initial, validated)
        except SaveError as error:
            run.reports.say(str(error))
    run.reports.saved(step)


def farewell(run: Run, step: int) -> int:
    """Says how the run ended at `step`; the exit code."""
    if step < run.last:
        run.reports.say(f"stopped at step {step}, all saved; the same command goes on from there")
        code = SAVED
    else:
        if run.saves:
            run.reports.say(f"done: {step} steps, in {run.config.folder}")
        code = DONE
    run.reports.ended(step, code)
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
