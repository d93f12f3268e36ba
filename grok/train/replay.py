"""A part of a run done again, to see that it comes out the same, bit for bit.

It is done in a temporary folder, from a checkpoint of the run or from its beginning, by the loop
that did it first, with the config of that time. Compared is every loss and every gradient norm
that the run logged.
"""

import dataclasses
import hashlib
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from grok import storage
from grok.config import RunConfig
from grok.config.load import from_dict, load_config
from grok.errors import DONE, CheckpointError
from grok.train.loop import run_training
from grok.train.telemetry.metrics_file import read_metrics
from grok.train.telemetry.run_manifest import code_version, read_manifest


class Part(NamedTuple):
    """A part of the run in `folder`: its steps `first` + 1 to `last`, what was logged of them, the
    config they were done with, and what `run.json` says of the process that did them."""

    folder: Path
    first: int
    last: int
    logged: list[dict[str, Any]]
    config: RunConfig
    start: dict[str, Any]


class Compared(NamedTuple):
    """A number that was logged, and what it was when the step was done again."""

    step: int
    name: str
    before: float
    again: float

    @property
    def equal(self) -> bool:
        """Whether they are the same float32; two that are no numbers are."""
        return np.array_equal(np.float32(self.before), np.float32(self.again), equal_nan=True)


def find_part(folder: Path, first: int | None, num_steps: int | None) -> Part:
    """The part of a run that follows its checkpoint `first` (0: from the beginning; default: the
    newest checkpoint with a logged step after it), `num_steps` long, or up to the end of what one
    config and one set of devices did.

    CheckpointError where the run does not have it.
    """
    lines = folder / "metrics.jsonl"
    if storage.is_remote(folder) or not lines.exists():
        raise CheckpointError(
            f"{folder} is no folder of a run on this machine: it has no metrics.jsonl to compare "
            "with; a folder that `grok train` has worked in would work."
        )
    logged = [line for line in read_metrics(lines) if "loss" in line]
    first = _checkpoint(folder, first, logged)
    record = read_manifest(str(folder))
    config, start, limit = (
        (load_config(folder / "config.yaml"), {}, None)
        if record is None
        else _as_it_was(record, first)
    )
    steps = [line["step"] for line in logged if line["step"] > first]
    end = min(limit or steps[-1], steps[-1]) if steps else first
    last = end if num_steps is None else first + num_steps
    if last > end or not [step for step in steps if step <= last]:
        fitting = [step - first for step in steps if step <= end]
        raise CheckpointError(
            f"{folder} has no logged steps of one config and devices from {first + 1} to "
            f"{max(last, first + 1)}; "
            + (
                f"--steps from {fitting[0]} to {fitting[-1]} would work."
                if fitting
                else "an earlier checkpoint would work."
            )
        )
    part = [line for line in logged if first < line["step"] <= last]
    return Part(folder, first, last, part, config, start)


def replay(part: Part) -> list[Compared]:
    """Does the steps of the part again, and compares.

    CheckpointError when these are other devices than those it was done on, the text is another, or
    the replay was asked to stop.
    """
    _check_devices(part)
    _check_text(part)
    with tempfile.TemporaryDirectory(prefix="grok-replay-") as name:
        again = Path(name)
        if part.first:
            (again / "checkpoints").mkdir()
            saved = part.folder / "checkpoints" / str(part.first)
            (again / "checkpoints" / saved.name).symlink_to(saved.absolute())
        if run_training(_config(part, again), replay_to=part.last) != DONE:
            raise CheckpointError("the replay was stopped before its end.")
        repeated = {
            line["step"]: line for line in read_metrics(again / "metrics.jsonl") if "loss" in line
        }
    return [
        Compared(line["step"], name, line[name], repeated[line["step"]].get(name, float("nan")))
        for line in part.logged
        for name in line
        if name == "loss" or name.startswith("grad_norm")
    ]


def program_then_and_now(part: Part) -> tuple[str, str]:
    """The commit of the code that did the part, and that of this one; empty where not known."""
    return _commit(part.start), _commit(code_version())


def _commit(program: dict[str, Any]) -> str:
    commit = program.get("commit") or ""
    return f"{commit[:12]}, with changes" if program.get("dirty") else commit[:12]


def _checkpoint(folder: Path, first: int | None, logged: list[dict[str, Any]]) -> int:
    """The checkpoint to begin from; 0 is the beginning, which every run has."""
    inside = folder / "checkpoints"
    there = [int(path.name) for path in inside.glob("*") if path.name.isdecimal()]
    steps = sorted({0, *there})
    if first is None:
        last = logged[-1]["step"] if logged else 0
        return max((step for step in steps if step < last), default=0)
    if first not in steps:
        raise CheckpointError(
            f"{folder} has no checkpoint of step {first}; there are "
            f"{', '.join(map(str, steps[1:])) or 'none'}, and 0, the beginning."
        )
    return first


def _as_it_was(record: dict[str, Any], first: int) -> tuple[RunConfig, dict[str, Any], int | None]:
    """The config that the steps after `first` were done with, the process that did them, and the
    step at which another config or other devices took over, if any did."""
    starts = record["starts"]
    # Where processes did the same steps, the lines of the last are in the log.
    covering = [i for i, start in enumerate(starts) if (start["first_step"] or 0) <= first]
    covering = [i for i in covering if starts[i]["first_step"] is not None]
    number = covering[-1] if covering else 0
    changes = [start.get("config_before") for start in starts[number + 1 :]]
    config = next((each for each in changes if each is not None), record["config"])
    limit, changed = None, False
    for start in starts[number + 1 :]:
        changed |= "config_before" in start or start["devices"] != starts[number]["devices"]
        # One that died before its first step changed the config all the same.
        if changed and start["first_step"] is not None:
            limit = start["first_step"]
            break
    return from_dict(config, "run.json"), starts[number], limit


def _check_devices(part: Part) -> None:
    then = part.start.get("devices")
    device = jax.devices()[0]
    now = {
        "kind": device.device_kind,
        "platform": device.platform,
        "count": jax.device_count(),
        "processes": jax.process_count(),
    }
    if then is not None and then != now:
        raise CheckpointError(
            f"{part.folder} ran on {_devices(then)}, and here are {_devices(now)}; bits are the "
            "same on the same devices alone."
        )


def _devices(facts: dict[str, Any]) -> str:
    count = facts["processes"]
    return f"{facts['count']} x {facts['kind']} in {count} process{'es' if count > 1 else ''}"


def _check_text(part: Part) -> None:
    record = read_manifest(str(part.folder)) or {}
    for each in record.get("data", ()):
        path = each.get("file")
        if path not in part.config.data.train:
            continue
        if hashlib.sha256(storage.read_bytes(path)).hexdigest() != each["sha256"]:
            raise CheckpointError(
                f"{path} is not the text that {part.folder} was trained on; the file of SHA-256 "
                f"{each['sha256'][:12]} would work."
            )


def _config(part: Part, folder: Path) -> RunConfig:
    """The part's config, without what is no part of its arithmetic."""
    config = part.config
    return dataclasses.replace(
        config,
        folder=str(folder),
        data=dataclasses.replace(
            config.data,
            validation=(),
            validation_dataset="",
            tokenizer=str(part.folder / "tokenizer.model"),
        ),
        train=dataclasses.replace(
            config.train, tensorboard=False, wandb="", profile=(), eval_every=0
        ),
    )
