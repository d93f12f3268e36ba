"""Replay: repeats steps of a run in a temporary folder, from a checkpoint or from its beginning,
and compares every loss and gradient norm that it logged, bit for bit."""

import dataclasses
import hashlib
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from grok import storage
from grok.config import RunConfig, TrainConfig
from grok.config.load import from_dict, load_config
from grok.data.text_files import text_files
from grok.data.tokenizers import tokenizer_file
from grok.errors import DONE, CheckpointError
from grok.train.loop import StartOptions, run_training
from grok.train.telemetry.metrics_file import read_metrics
from grok.train.telemetry.run_manifest import describe_devices, device_facts, read_manifest


class Segment(NamedTuple):
    """Steps `first` + 1 to `last` of the run in `folder`, the metrics `logged` of them, the config
    of that time, and the entry of `run.json` for the process that ran them ({}: unknown)."""

    folder: Path
    first: int
    last: int
    logged: list[dict[str, Any]]
    config: RunConfig
    process: dict[str, Any]


class Comparison(NamedTuple):
    """A number that was logged, and its value in the replay."""

    step: int
    name: str
    logged: float
    replayed: float

    @property
    def equal(self) -> bool:
        """True if both are the same float32, or both NaN."""
        return np.array_equal(np.float32(self.logged), np.float32(self.replayed), equal_nan=True)


def find_segment(folder: Path, first: int | None, num_steps: int | None) -> Segment:
    """Finds the steps after the checkpoint `first` (0: the beginning; default: the newest with a
    logged step after it): `num_steps`, or as many as have the same config and devices. Raises
    CheckpointError when the run does not have them."""
    path = folder / "metrics.jsonl"
    if storage.is_remote(folder) or not path.exists():
        raise CheckpointError(
            f"{folder} is no folder of a run on this machine: it has no metrics.jsonl to compare "
            "with; a folder that `grok train` has worked in would work."
        )
    logged = _logged_steps(path)
    first = _first_step(folder, first, logged)
    config, process, limit = _config_at(folder, first)
    steps = [line["step"] for line in logged if line["step"] > first]
    end = min(limit or steps[-1], steps[-1]) if steps else first
    last = end if num_steps is None else first + num_steps
    if last > end or not any(step <= last for step in steps):
        lengths = [step - first for step in steps if step <= end]
        steps_advice = f"--steps from {lengths[0]} to {lengths[-1]}" if lengths else None
        raise CheckpointError(
            f"{folder} has no logged steps of one config and devices from {first + 1} to "
            f"{max(last, first + 1)}; {steps_advice or 'an earlier checkpoint'} would work."
        )
    logged = [line for line in logged if first < line["step"] <= last]
    return Segment(folder, first, last, logged, config, process)


def replay(segment: Segment) -> list[Comparison]:
    """Repeats the steps. CheckpointError when devices or text are not the run's, or if stopped."""
    _check_same_machine_and_text(segment)
    with tempfile.TemporaryDirectory(prefix="grok-replay-") as name:
        folder = Path(name)
        if segment.first:
            (folder / "checkpoints").mkdir()
            saved = segment.folder / "checkpoints" / str(segment.first)
            (folder / "checkpoints" / saved.name).symlink_to(saved.absolute())
        # The optimizer's keys may have changed at the segment's checkpoint.
        options = StartOptions(replay_to=segment.last, resume_changed=True)
        if run_training(_replay_config(segment, folder), options) != DONE:
            raise CheckpointError("the replay was stopped before its end.")
        replayed = {line["step"]: line for line in _logged_steps(folder / "metrics.jsonl")}
    return [
        Comparison(line["step"], name, line[name], replayed[line["step"]].get(name, float("nan")))
        for line in segment.logged
        for name in line
        if name == "loss" or name.startswith("grad_norm")
    ]


def _logged_steps(path: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(path) if "loss" in line]


def _first_step(folder: Path, first: int | None, logged: list[dict[str, Any]]) -> int:
    """The step of the checkpoint to start from; 0 is the beginning, which every run has."""
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    steps = sorted({0, *(int(name) for name in names if name.isdecimal())})
    if first is None:
        last = logged[-1]["step"] if logged else 0
        return max((step for step in steps if step < last), default=0)
    if first not in steps:
        raise CheckpointError(
            f"{folder} has no checkpoint of step {first}; there are "
            f"{', '.join(map(str, steps[1:])) or 'none'}, and 0, the beginning."
        )
    return first


def _config_at(folder: Path, first: int) -> tuple[RunConfig, dict[str, Any], int | None]:
    """The config after `first`, the process that ran it, and the step at which others took over."""
    manifest = read_manifest(str(folder))
    if manifest is None:
        return load_config(folder / "config.yaml"), {}, None
    processes = manifest["starts"]
    # Of several processes that ran the same steps, the metrics of the last are in the file.
    begins = [process["first_step"] for process in processes]
    index = max((i for i, at in enumerate(begins) if at is not None and at <= first), default=0)
    process, later = processes[index], processes[index + 1 :]
    replaced = [p["config_before"] for p in later if p.get("config_before") is not None]
    config = from_dict(replaced[0] if replaced else manifest["config"], "run.json")
    changed = False
    for successor in later:
        changed |= "config_before" in successor or successor["devices"] != process["devices"]
        # One that died before its first step changed the config all the same.
        if changed and successor["first_step"] is not None:
            return config, process, successor["first_step"]
    return config, process, None


def _check_same_machine_and_text(segment: Segment) -> None:
    then, now = segment.process.get("devices"), device_facts(jax.devices())
    if then is not None and then != now:
        raise CheckpointError(
            f"{segment.folder} ran on {describe_devices(then)}, and here are "
            f"{describe_devices(now)}; only the same devices give the same bits."
        )
    texts = text_files(segment.config.data.train)
    for source in (read_manifest(str(segment.folder)) or {}).get("data", ()):
        path = source.get("file")
        if path not in texts:
            continue
        if hashlib.sha256(storage.read_bytes(path)).hexdigest() != source["sha256"]:
            raise CheckpointError(
                f"{path} is not the text that {segment.folder} was trained on; the file of SHA-256 "
                f"{source['sha256'][:12]} would work."
            )


def _replay_config(segment: Segment, folder: Path) -> RunConfig:
    """The segment's config in another folder, without what does not affect the numbers."""
    config, tokenizer = segment.config, tokenizer_file(segment.folder)
    no_text: dict[str, Any] = {"validation": (), "validation_dataset": "", "domains": ()}
    data = dataclasses.replace(config.data, **no_text, tokenizer=tokenizer)
    off = TrainConfig.default("sdc_check_every")
    unwatched: dict[str, Any] = {"tensorboard": False, "wandb": "", "profile": (), "eval_every": 0}
    unwatched |= {"eval_tasks": (), "eval_tasks_folder": "", "eval_tasks_limit": 0}
    train = dataclasses.replace(config.train, **unwatched, sdc_check="off", sdc_check_every=off)
    return dataclasses.replace(config, folder=str(folder), data=data, train=train)
