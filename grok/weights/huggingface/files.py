"""The files of a Hugging Face folder: those that its index lists, all safetensors files where there
is none, or those of tensor-parallel ranks (`ranks.py`)."""

import re
from collections.abc import Mapping
from typing import Any

from grok import storage
from grok.errors import CheckpointError
from grok.weights.huggingface.ranks import find_ranked_tensors, has_ranks
from grok.weights.huggingface.safetensors import TensorInfo, read_headers
from grok.weights.source import quoted, read_object

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
# The journal of an unfinished export.
UNFINISHED = "unfinished-export.json"
# Mistral's own files beside those of transformers: other names, and another order of heads' rows.
OTHER_LAYOUT = "consolidated"


def read_config_json(folder: str) -> tuple[str, dict[str, Any]]:
    """The path and the content of a folder's config.json."""
    path = storage.join(folder, CONFIG)
    return path, read_object(path)


def find_tensors(
    folder: str, present: Mapping[str, int | None]
) -> dict[str, tuple[TensorInfo, ...]]:
    """Every tensor by name: one part, or that of each rank. Raises CheckpointError, with the file,
    for files that are missing or damaged, and where they and the index disagree."""
    if UNFINISHED in present:
        raise CheckpointError(
            f"{folder}: is an unfinished export; the same `grok export hf` again finishes it."
        )
    if INDEX not in present and has_ranks(present):
        return find_ranked_tensors(folder, present)
    index = _read_index(storage.join(folder, INDEX)) if INDEX in present else None
    files = _listed(folder, present, index) if index is not None else _all(folder, present)
    entries: dict[str, TensorInfo] = {}
    for header in read_headers(folder, files, present).values():
        for name, entry in header.items():
            if name in entries:
                other = f"{entries[name].path} too; it should be in one file"
                raise CheckpointError(f"{entry.path}: {quoted(name)} is in {other}.")
            entries[name] = entry
    if index is not None:
        _check_index(folder, index, entries)
    if not entries:
        raise CheckpointError(f"{folder}: its safetensors files have no tensors.")
    return {name: (entry,) for name, entry in entries.items()}


def _listed(folder: str, present: Mapping[str, int | None], index: dict[str, str]) -> list[str]:
    for name, file in index.items():
        if present.get(file) is None:
            path, tensor = storage.join(folder, file), quoted(name)
            raise CheckpointError(f"{path}: is missing; the index says that it has {tensor}.")
    return sorted(set(index.values()))


def _all(folder: str, present: Mapping[str, int | None]) -> list[str]:
    stored = sorted(f for f in present if f.endswith(".safetensors") and not f.startswith("."))
    files = [file for file in stored if not file.startswith(OTHER_LAYOUT)]
    if files:
        return files
    problem = "has no *.safetensors files."
    pickles = sorted(name for name in present if name.endswith((".bin", ".pt", ".pth")))
    if stored:
        problem = (
            f"has weights in Mistral's own layout ({stored[0]}), which is not read; the files "
            "model-*.safetensors of the same repository would work."
        )
    elif pickles:
        problem = (
            f"has pickled weights ({pickles[0]}), which cannot be read without executing "
            "what they say; a copy in safetensors would work."
        )
    raise CheckpointError(f"{folder}: {problem}")


def _check_index(folder: str, index: dict[str, str], entries: dict[str, TensorInfo]) -> None:
    for name, file in index.items():
        path = storage.join(folder, file)
        if name not in entries:
            raise CheckpointError(f"{path}: has no {quoted(name)}, which {INDEX} says it has.")
        if entries[name].path != path:
            path = entries[name].path
            raise CheckpointError(f"{path}: has {quoted(name)}, which {INDEX} says is in {file}.")
    extra = min(entries.keys() - index.keys(), default=None)
    if extra is not None:
        path = entries[extra].path
        raise CheckpointError(f"{path}: has {quoted(extra)}, which {INDEX} leaves out.")


def _read_index(path: str) -> dict[str, str]:
    files = read_object(path).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{path}: should have a weight_map from tensors to files.")
    for name, file in files.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise CheckpointError(
                f"{path}: {quoted(name)} is said to be in {file!r:.100}; that should be the name "
                "of a safetensors file in this folder."
            )
    return files
