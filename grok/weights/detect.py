"""From a path to a source of weights, whatever format is there."""

import difflib
import itertools
import os
from collections.abc import Iterable

from grok import storage
from grok.checkpoint.file_list import FILES, check_files
from grok.config import ModelConfig
from grok.config.load import from_dict
from grok.errors import CheckpointError
from grok.weights.huggingface.source import HuggingFaceSource
from grok.weights.orbax.metadata import LORA, STEP_METADATA, read_meta
from grok.weights.orbax.source import NO_WEIGHTS, LoraSource, OrbaxSource, step_folder
from grok.weights.source import Source
from grok.weights.xai.source import ReleaseSource, implied_config

MAX_RUNS, MAX_LISTED = 3, 1000  # that a message names, and that are looked at


def open_source(path: str | os.PathLike[str], config: ModelConfig | None = None) -> Source:
    """The weights at `path`, local or gs://: a `ckpt-0` folder, a Hugging Face folder, or a
    checkpoint of ours (a run's folder, its `checkpoints`, or one step of it). `config` is the
    expected model, by default what the files state or imply. Raises CheckpointError where `path` is
    none of these, or holds another model."""
    if not storage.is_remote(path) and os.path.isfile(path):
        raise CheckpointError(_of_file(os.fspath(path)))
    present = list_files(path)
    if is_release(present):
        return ReleaseSource(path, config or implied_config(path))
    if is_huggingface(present):
        return HuggingFaceSource(path, config)
    ours = ("checkpoints", "config.yaml", STEP_METADATA, FILES, ".import")
    has_steps = any(name.isdecimal() and size is None for name, size in present.items())
    if has_steps or any(name in present for name in ours):
        step = step_folder(os.fspath(path))
        if LORA in storage.list_files(step, CheckpointError):
            return _lora_source(step, config)
        return OrbaxSource(path, config)
    if "ckpt-0" in present:
        raise CheckpointError(
            f"{path}: has no weights itself; {storage.join(path, 'ckpt-0')} may be what you mean."
        )
    runs = [] if storage.is_remote(path) else _runs_in(path)
    hint = f" It has {' and '.join(runs)}, which may be what you mean." if runs else ""
    raise CheckpointError(
        f"{path}: is neither a ckpt-0 folder (tensor00000_000, ...), nor a Hugging Face folder "
        f"(config.json, *.safetensors), nor a checkpoint of grok (checkpoints/).{hint}"
    )


def _of_file(path: str) -> str:
    """The refusal of a file in place of a folder of weights."""
    folder = os.path.dirname(path) or "."
    names = os.listdir(folder)
    if is_release(names) or is_huggingface(names) or "checkpoints" in names:
        return (
            f"{path}: is a file, and weights are a folder; {folder}, in which it lies, would work."
        )
    return (
        f"{path}: is a file, and weights are a folder: that of a run, a ckpt-0 folder, or a "
        "Hugging Face folder."
    )


def list_files(path: str | os.PathLike[str]) -> dict[str, int | None]:
    """The files at `path`, as `storage.list_files` has them. Raises CheckpointError, which names
    runs beside a path that is not there."""
    if not storage.is_remote(path) and not os.path.exists(path):
        raise CheckpointError(f"{path}: cannot be read: No such file or directory; {_right(path)}.")
    return storage.list_files(path, CheckpointError)


def _right(path: str | os.PathLike[str]) -> str:
    """A sentence's end on what would work in place of a path that is not there: runs beside it."""
    folder, name = os.path.split(os.fspath(path).rstrip("/"))
    runs = {os.path.basename(run): run for run in _runs_in(folder, MAX_LISTED)}
    near = difflib.get_close_matches(name, runs, MAX_RUNS, cutoff=0.3) or [*runs][:MAX_RUNS]
    if near:
        return f"{' or '.join(runs[name] for name in near)} would work"
    return "the folder of a run, ckpt-0, a Hugging Face folder or hf://ORG/NAME would work"


def _runs_in(folder: str | os.PathLike[str], count: int = MAX_RUNS) -> list[str]:
    """Folders of runs in a local folder, the first ones of so many."""
    try:
        names = sorted(os.listdir(folder or "."))[:MAX_LISTED]
    except OSError:
        return []
    paths = (os.path.join(folder, name) for name in names)
    runs = (path for path in paths if os.path.isdir(os.path.join(path, "checkpoints")))
    return list(itertools.islice(runs, count))


def is_release(present: Iterable[str]) -> bool:
    """Returns True for the file names of a ckpt-0 folder, complete or not."""
    return any(name.startswith("tensor0") for name in present)


def is_huggingface(present: Iterable[str]) -> bool:
    """Returns True for the file names of a Hugging Face folder, complete or not."""
    return any(name == "config.json" or name.endswith(".safetensors") for name in present)


def _lora_source(step: str, config: ModelConfig | None) -> Source:
    """The weights that a run with adapters started from, with the adapters of `step` added."""
    check_files(step, NO_WEIGHTS)
    meta = read_meta(step)
    run = from_dict(meta["config"], storage.join(step, "meta", "metadata"))
    started = meta["init_from"]
    try:
        base = open_source(started["path"], config or run.model)
    except CheckpointError as error:
        problem = "has adapters alone, and the weights that they belong to cannot be opened"
        raise CheckpointError(f"{step}: {problem}: {error}") from error
    return LoraSource(step, run, base, started["checksum"])


def stated_config(path: str | os.PathLike[str]) -> ModelConfig | None:
    """The model that the files at `path` state; None where only their shapes imply it."""
    present = storage.list_files(path, CheckpointError)
    by_shape = ("tensor0", "model.safetensors", "model-0", "pytorch_model-0")
    if "config.json" not in present and any(name.startswith(by_shape) for name in present):
        return None
    return open_source(path).config
