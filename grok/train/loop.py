"""A training run, top to bottom.

In the run's folder: `config.yaml` (resolved), `tokenizer.model`, `metrics.jsonl`, `checkpoints/`.
Started again with the same command, a run goes on from its newest checkpoint, bit for bit as if
it had never stopped.
"""

import functools
import os
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path

import jax

from grok import sharding
from grok.checkpoint.manager import MODEL, OPTIMIZER, Checkpoints
from grok.config import RunConfig, check_fits
from grok.config_files import flatten, to_dict
from grok.config_text import to_yaml
from grok.data.pipeline import Batch, global_batches, to_mesh
from grok.data.text import bits_per_byte
from grok.errors import DONE, SAVED, CheckpointError, ConfigError
from grok.train.data import RunData, check_unchanged, read_data
from grok.train.metrics import Display, MetricsFile, Speed
from grok.train.optimizer import make_optimizer, make_schedule
from grok.train.state import TrainState, abstract_state, init_state
from grok.train.step import eval_step, train_step


def run(config: RunConfig) -> int:
    """Trains as `config` says and returns the exit code: DONE, or SAVED when asked to stop."""
    # ---- devices and data: everything that can be wrong is found before anything compiles
    if config.model.param_dtype == "int8":
        raise ConfigError(
            "model.param_dtype=int8 is for inference, and int8 matrices have no gradient; "
            "model.param_dtype=float32 would work."
        )
    sizes = check_fits(config, jax.device_count())
    mesh = sharding.make_mesh(sizes["data"], sizes["expert"], sizes["tensor"], sizes["slice"])
    data = read_data(config)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    folder = Path(config.folder)
    checkpoints = Checkpoints(folder / "checkpoints", keep=config.checkpoint.keep)
    first = checkpoints.latest() or 0

    with jax.set_mesh(mesh), StopRequest() as stop, Display(config.train.steps, first) as display:
        display.say(describe(config, sizes))

        # ---- state: the newest checkpoint, or fresh
        if first:
            display.say(f"resuming from the checkpoint of step {first}")
            state, changes = restore(checkpoints, first, config, data, optimizer, mesh)
            for change in changes:
                display.say(f"changed since then: {change}")
        else:
            display.say("making the initial parameters")
            state = init_state(config, optimizer, mesh)
            shutil.copyfile(config.data.tokenizer, folder / "tokenizer.model")
        (folder / "config.yaml").write_text(to_yaml(config))
        metrics_file = MetricsFile(folder / "metrics.jsonl", first)
        if first:
            metrics_file.write(first, event="resumed")

        # ---- the steps; each is compiled when it first runs
        step_function = jax.jit(
            functools.partial(train_step, config=config.train, optimizer=optimizer),
            donate_argnums=0,
        )
        eval_function = jax.jit(eval_step)
        learning_rate = make_schedule(config.optimizer, config.train.steps)
        speed = Speed(config.data.batch_size * config.data.sequence_length)
        if first < config.train.steps:
            display.say("compiling the training step")

        # ---- the loop
        step = saved = first
        batches = global_batches(
            data.train,
            mesh,
            (config.data.batch_size, config.data.sequence_length),
            range(first, config.train.steps),
            config.data.prefetch,
        )
        while step < config.train.steps and not stop.requested():
            state, metrics = step_function(state, next(batches))
            step += 1
            display.advance(step)
            if step == first + 1:
                # The first step waits for its compilation, which is not part of any speed.
                jax.block_until_ready(metrics)
                speed.start(step)
            last = step == config.train.steps
            if step % config.train.log_every == 0 or last:
                values = {name: value.tolist() for name, value in jax.device_get(metrics).items()}
                values["learning_rate"] = float(learning_rate(step - 1))
                values["tokens_per_second"] = speed.at(step)
                values["tokens_seen"] = data.train.tokens_seen(step)
                metrics_file.write(step, **values)
                display.report(step, values["loss"], values["tokens_per_second"])
            due = config.train.eval_every and step % config.train.eval_every == 0
            if data.validation is not None and (last or due):
                values = validate(eval_function, state.model, data.validation, data.num_bytes, mesh)
                metrics_file.write(step, **values)
                said = (f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items())
                display.say(f"step {step}  {'  '.join(said)}")
                speed.start(step)
            if last or step % config.checkpoint.every == 0:
                save(checkpoints, step, state, config, data)
                saved = step
                speed.start(step)
        if saved != step:
            save(checkpoints, step, state, config, data)
        checkpoints.close()
        metrics_file.close()
        if step < config.train.steps:
            display.say(f"stopped at step {step}, all saved; the same command goes on from there")
            return SAVED
        display.say(f"done: {step} steps, in {folder}")
        return DONE


def validate(
    eval_function, model, batches: Iterable[Batch], num_bytes: int | None, mesh
) -> dict[str, float]:
    """Loss of a validation pass in nats a token, and in bits per byte where bytes are known."""
    nats = num_tokens = 0.0
    for batch in batches:
        nats += float(eval_function(model, to_mesh(batch, mesh)))
        num_tokens += float(batch["mask_BT"].sum(dtype="float64"))
    values = {"validation_loss": nats / num_tokens}
    if num_bytes is not None:
        values["validation_bits_per_byte"] = bits_per_byte(nats, num_bytes)
    return values


def save(
    checkpoints: Checkpoints, step: int, state: TrainState, config: RunConfig, data: RunData
) -> None:
    """Starts saving everything a resumed run needs; batches are numbered by step."""
    trees = {MODEL: state.model, OPTIMIZER: (state.step, state.opt_state)}
    checkpoints.save(step, trees, {"config": to_dict(config), "data": data.hashes})


def restore(
    checkpoints: Checkpoints, step: int, config: RunConfig, data: RunData, optimizer, mesh
) -> tuple[TrainState, list[str]]:
    """The state saved at `step`, placed on `mesh`, and what the config says differently now.

    Raises CheckpointError when the model is another one, naming what differs, or when prepared
    datasets are others than before and data.allow_changed does not say that they may be.
    """
    meta = checkpoints.meta(step)
    if not config.data.allow_changed:
        check_unchanged(meta.get("data", []), data.hashes, str(checkpoints.folder / str(step)))
    stored = dict(flatten(meta["config"]))
    changes = []
    for key, value in flatten(to_dict(config)):
        before = stored.get(key)
        if before == value:
            continue
        if key.startswith("model.") and key not in ("model.compute_dtype", "model.remat"):
            raise CheckpointError(
                f"{checkpoints.folder / str(step)} was trained with {key}={before} and the config "
                f"says {value}; set it back, or name another folder."
            )
        changes.append(f"{key} from {before} to {value}")
    wanted = abstract_state(config, optimizer, mesh)
    trees = {MODEL: wanted.model, OPTIMIZER: (wanted.step, wanted.opt_state)}
    read = checkpoints.restore(step, trees)
    steps_done, opt_state = read[OPTIMIZER]
    return TrainState(steps_done, read[MODEL], opt_state), changes


def describe(config: RunConfig, sizes: dict[str, int]) -> str:
    """One line: model, mesh, batch."""
    model, data = config.model, config.data
    mesh = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    return (
        f"{model.num_parameters():,} parameters ({model.num_active_parameters():,} a token) on "
        f"mesh {mesh}; {data.batch_size} rows of {data.sequence_length} tokens a step"
    )


class StopRequest:
    """Notices SIGINT and SIGTERM: the first asks the loop to save and leave after the running
    step, the second ends the process at once."""

    def __init__(self) -> None:
        self._requested = False

    def requested(self) -> bool:
        """Whether someone has asked the run to stop."""
        return self._requested

    def __enter__(self) -> "StopRequest":
        self._before = {
            number: signal.signal(number, self._notice)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame: object) -> None:
        self._requested = True
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        # Straight to the descriptor: the signal may have come in the middle of a print.
        os.write(2, b"\nstopping after this step; once more stops at once, without saving\n")
