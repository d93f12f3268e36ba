"""Everything that a run records while it goes on: `metrics.jsonl`, `events.jsonl`, `run.json`,
if asked for TensorBoard's files and a profile, and progress; by the primary process alone."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from grok import storage
from grok.config import ModelConfig, RunConfig
from grok.errors import GrokError
from grok.hardware import peak_flops
from grok.model.flops import flops_per_token
from grok.progress import ProgressDisplay
from grok.train.run_data import RunData
from grok.train.telemetry.event_log import EventLog
from grok.train.telemetry.host_times import HostTimes, slow_host
from grok.train.telemetry.metrics_file import MetricsFile, to_plain
from grok.train.telemetry.profiler import PROFILE_FOLDER, Profiler
from grok.train.telemetry.run_manifest import RunDir, RunManifest
from grok.train.telemetry.trackers import Tracker, open_trackers

SMOOTHING = 0.9  # share of the smoothed loss that stays from one logged step to the next


@dataclasses.dataclass
class Dispatch:
    """One step, for the block of `Telemetry.step`, which sets its `outputs`."""

    is_first_of_shape: bool  # no batch of this shape came before: the step will compile
    outputs: Any = None  # the new state and the metrics


class Telemetry:
    """The records of one process of a run; nothing is written before it is entered."""

    def __init__(self, config: RunConfig, mesh: Mesh, data: RunData, first: int, began: float):
        """For a run after step `first`; `began`: when this process did, seconds since 1970."""
        self._began = began
        self._config, self._mesh, self._data, self._step = config, mesh, data, first
        self._run_dir = RunDir(config.folder) if jax.process_index() == 0 else None
        self._folder = self._run_dir.path if self._run_dir else None
        self._display = ProgressDisplay(
            "step {done:,}/{total:,}",
            config.train.steps,
            first,
            note="starting",
            line_seconds=math.inf,  # a line for each logged step instead
            quiet=self._folder is None,
        )
        self._figures: list[str] = []
        self._loss_sum = self._loss_weight = 0.0
        self._shapes: set[tuple[int, int]] = set()
        self._hosts = HostTimes(mesh)
        self._slow_host: str | None = None

    def __enter__(self) -> "Telemetry":
        with contextlib.ExitStack() as exits:
            if self._run_dir:
                exits.enter_context(self._run_dir)
            self.events = exits.enter_context(EventLog(self._path("events.jsonl"), self._began))
            exits.enter_context(self._display)
            with self.events.during("start"):
                self._open(exits)
            self._exits = exits.pop_all()
        return self

    def _path(self, name: str) -> Path | None:
        return self._folder and self._folder / name

    def _open(self, exits: contextlib.ExitStack) -> None:
        config, folder = self._config, self._folder
        self.rates = Rates(config.model, self._mesh, self.events)
        self.metrics = exits.enter_context(MetricsFile(self._path("metrics.jsonl"), self._step))
        self._manifest: RunManifest | None = None
        self._trackers: list[Tracker] = []
        if folder is not None:
            self._manifest = RunManifest(config.folder, config, self._mesh, self._data)
            self._trackers = open_trackers(config, folder, self._manifest.run_id, self._step)
        for tracker in self._trackers:
            exits.callback(tracker.close)
        profiler = Profiler(self._run_dir, config.folder, config.train.profile, self.events)
        self._profiler = exits.enter_context(profiler)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            # A full disk may be what ended the run.
            with contextlib.suppress(OSError):
                self.ended(self._step, error.exit_code if isinstance(error, GrokError) else 1)
        self._exits.__exit__(kind, error, trace)

    def log(self, text: str) -> None:
        """Shows a line to people."""
        self._display.log(text)

    def resumed(self, step: int) -> None:
        """Records that the steps begin, after `step`."""
        self.events.note("resumed", step=step)
        self.events.steps_from(step)
        self.rates.take()
        if self._manifest:
            self._manifest.resumed(step)
        if step:
            self.metrics.write(step, event="resumed")

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Times a wait for data."""
        with self.events.waiting(), self._hosts.busy():
            yield

    @contextlib.contextmanager
    def step(self, step: int, batch: Mapping[str, jax.Array]) -> Iterator[Dispatch]:
        """Times and profiles the block, which dispatches `step`. The first step of each shape of
        batches compiles: it is waited for, as an event of its own, and is part of no speed."""
        B, T = batch["targets_BT"].shape
        dispatch = Dispatch(is_first_of_shape=(B, T) not in self._shapes)
        self._profiler.before(step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            if dispatch.is_first_of_shape:
                self._shapes.add((B, T))
                self.log("compiling the training step")
                with self.events.during("compile", step=step):
                    yield dispatch
                    jax.block_until_ready(dispatch.outputs)
            else:
                with self._hosts.busy():
                    yield dispatch
                self._hosts.count_step()
                self.rates.count(B, T)
        if self._profiler.after(step, dispatch.outputs[1]):
            where = storage.join(self._config.folder, PROFILE_FOLDER)
            self.log(f"profile of the steps up to {step} in {where}")
        self._step = step

    def log_metrics(self, step: int, metrics: Mapping[str, jax.Array], **more: Any) -> None:
        """Waits for the metrics of a step; writes them, and `more`, and shows the main ones."""
        values = to_plain(metrics) | more | self.rates.take() | self._hosts.exchange()
        sentence = slow_host(values)
        if sentence and values["slow_host"] != self._slow_host:
            self.log(f"step {step}  {sentence}")
        self._slow_host = values.get("slow_host")
        self._write(step, values)
        loss = values["loss"]
        self._figures = [f"loss {loss:.3f}", f"smoothed {self._smooth(loss):.3f}"]
        for key, text in (("tokens_per_second", "{:,.0f} tokens/s"), ("mfu", "MFU {:.1%}")):
            if values.get(key) is not None:
                self._figures.append(text.format(values[key]))
        note = self._display.update(step, *self._figures)
        if not self._display.is_terminal:
            self.log(f"step {step}  {note}")
        self.events.steps_to(step, at_once=False)

    def advance(self, step: int, saving: int | None) -> None:
        """Moves the bar to `step`; `saving`: the step whose checkpoint is being written."""
        saves = [] if saving is None else [f"saving step {saving}"]
        self._display.update(step, *self._figures, *saves)

    def log_validation(self, step: int, losses: Mapping[str, float]) -> None:
        """Writes and shows the losses of a validation pass."""
        self._write(step, losses)
        figures = (f"{name.replace('_', ' ')} {value:.4f}" for name, value in losses.items())
        self.log(f"step {step}  {'  '.join(figures)}")

    def saved(self, step: int) -> None:
        """Records that a save of `step` was started."""
        self.events.steps_to(step)
        try:
            if self._manifest and self._run_dir:
                self._manifest.saved(step)
                self._run_dir.upload()
        except OSError as error:
            # The next save may work again, and checkpoints do not depend on these files.
            self.log(f"{self._config.folder} cannot be written: {storage.reason(error)}")

    def rolled_back(self, step: int, **facts: Any) -> None:
        """Records that the run is back at an earlier `step`; drops the metrics of later steps."""
        self.events.steps_to(self._step)
        self.events.note("rolled_back", step=step, **facts)
        self.back_to(step)

    def back_to(self, step: int) -> None:
        """Drops the metrics of steps after `step`, which follow again."""
        self.metrics.truncate(step)
        self._step = step

    def ended(self, step: int, code: int) -> None:
        """Records that the run ends after `step` with exit code `code`; all saves are on disk."""
        self.events.steps_to(step)
        self.events.note("ended", step=step, code=code)
        if self._manifest:
            self._manifest.ended(step, code)

    def _smooth(self, loss: float) -> float:
        """Exponential mean of the finite losses so far, not biased to zero; `loss` before any."""
        if math.isfinite(loss):
            self._loss_sum = SMOOTHING * self._loss_sum + (1 - SMOOTHING) * loss
            self._loss_weight = SMOOTHING * self._loss_weight + (1 - SMOOTHING)
        return self._loss_sum / self._loss_weight if self._loss_weight else loss

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        self.metrics.write(step, **values)
        for tracker in self._trackers:
            tracker.write(step, values)


class Rates:
    """Speed of the steps since the last report, without compilation, saves and validation."""

    def __init__(self, model: ModelConfig, mesh: Mesh, events: EventLog):
        self._model, self._clock = model, events.clock
        peak = peak_flops(mesh.devices.flat[0].device_kind)
        self._peak = None if peak is None else peak * mesh.devices.size
        self._tokens = self._flops = 0
        self._since = self._clock()

    def count(self, B: int, T: int) -> None:
        """Counts a step of B rows of T tokens."""
        self._tokens += B * T
        self._flops += B * T * flops_per_token(self._model, T)

    def take(self) -> dict[str, float | None]:
        """Returns the rates since the last call: `tokens_per_second`, None without a step, and on
        known chips `mfu`, the share of their peak FLOP/s that `flops_per_token` amounts to."""
        seconds = self._clock() - self._since
        rates = {"tokens_per_second": self._tokens / seconds if self._tokens else None}
        if self._tokens and self._peak is not None:
            rates["mfu"] = self._flops / seconds / self._peak
        self._tokens = self._flops = 0
        self._since = self._clock()
        return rates
