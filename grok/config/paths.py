"""Paths in a run's config, which stays the same run from whatever folder it is started."""

import dataclasses
import datetime
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grok.config.run import RunConfig


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The config with its local files and folders named from the root of the file system."""
    data = config.data
    named_files: dict[str, Any] = {
        "train": tuple(map(absolute, data.train)),
        "validation": tuple(map(absolute, data.validation)),
        "domains": tuple(map(absolute, data.domains)),
        "validation_dataset": absolute(data.validation_dataset),
        "tokenizer": absolute(data.tokenizer),
        "datasets": tuple(
            dataclasses.replace(dataset, path=absolute(dataset.path)) for dataset in data.datasets
        ),
    }
    return dataclasses.replace(
        config,
        folder=absolute(config.folder),
        compile_cache=absolute(config.compile_cache),
        data=dataclasses.replace(data, **named_files),
        train=dataclasses.replace(
            config.train,
            init_from=absolute(config.train.init_from),
            eval_tasks_folder=absolute(config.train.eval_tasks_folder),
        ),
    )


def absolute(path: str) -> str:
    """The path from the root, if it names something on this machine; else as it is."""
    return os.path.abspath(path) if path and "://" not in path else path


def is_same_path(one: Any, other: Any) -> bool:
    """True if two values, paths or lists of paths, name the same local files or folders."""
    if isinstance(one, str) and isinstance(other, str):
        return absolute(one) == absolute(other)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_same_path, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_same_path(one[k], other[k]) for k in one)
    return one == other


def new_folder(config_name: str) -> str:
    """A folder that is not there yet, for a run whose config names none: by the config's name, a
    file or a preset, and the time, as in `runs/grok-10m-20261129-141502`."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    name = os.path.join("runs", f"{Path(config_name).stem}-{now}")
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(folder for folder in names if not os.path.exists(folder))


def run_folder(file: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` of a config file. Where the file is the `config.yaml` of a run, `folder` names the
    folder that it lies in: the run goes on there, wherever that was moved."""
    is_of_run = file.name == "config.yaml" and (file.parent / "run.json").exists()
    folder = data.get("folder")
    if (
        not is_of_run
        or not isinstance(folder, str)
        or os.path.abspath(folder) == os.path.abspath(file.parent)
    ):
        return dict(data)
    return {**data, "folder": str(file.parent)}
