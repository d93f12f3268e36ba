"""Describes incomplete or damaged weights, which `open_source` refuses."""

import dataclasses
import math
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np

from grok import storage
from grok.config import ModelConfig
from grok.errors import CheckpointError
from grok.model.params import param_specs
from grok.resumable import journal_lines
from grok.weights.detect import is_huggingface, is_release
from grok.weights.huggingface.source import INDEX
from grok.weights.importing.importer import JOURNAL, STAGING
from grok.weights.source import read_object
from grok.weights.xai.objects import StoredTensor
from grok.weights.xai.source import file_shape, tensor_names
from grok.weights.xai.unpickler import read_tensor

DTYPES = {str(d): d for d in map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16, np.int8))}
# Missing files named in a message.
NAMED_FILES = 5


@dataclasses.dataclass(frozen=True)
class TensorSummary:
    """A stored tensor, with the fields of a TensorSpec, counting the layers that are present."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    groups: int | None
    bytes: int


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """The format, None if unknown, the tensors, and the problems of some weights; of a release, the
    shapes of parameters in its files, and the least number of its layers."""

    format: str | None = None
    tensors: tuple[TensorSummary, ...] = ()
    problems: tuple[str, ...] = ()
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    num_layers: int = 0


def diagnose(path: str, config: ModelConfig | None = None) -> Diagnosis:
    """Describes the weights at `path`, which `open_source` refused; raises nothing."""
    try:
        present = set(storage.list_files(path, CheckpointError))
        if is_release(present):
            return _release(path, present, config)
        if is_huggingface(present):
            return _huggingface(path, present)
        if STAGING in present:
            return _import(path)
        if "checkpoints" in present or "_CHECKPOINT_METADATA" in present:
            return Diagnosis("orbax")
    except CheckpointError as error:
        return Diagnosis(problems=(str(error),))
    return Diagnosis()


def _release(path: str, present: set[str], config: ModelConfig | None) -> Diagnosis:
    numbers = [int(name[6:11]) for name in present if re.fullmatch(r"tensor\d{5}_000", name)]
    if not numbers:
        return Diagnosis("xai")
    # The last layer's last file has the number 1 + 12 * num_layers.
    num_layers = config.num_layers if config else max(1, math.ceil((max(numbers) - 1) / 12))
    expected = tensor_names(num_layers)
    tensors = [tensor for tensor in expected if tensor.file in present]
    missing = [str(tensor) for tensor in expected if tensor.file not in present]
    problems = _missing(missing, len(expected))
    stored: dict[str, list[StoredTensor]] = {tensor.name: [] for tensor in tensor_names(1)}
    with ThreadPoolExecutor(16) as pool:
        results = pool.map(_read_tensor, [storage.join(path, tensor.file) for tensor in tensors])
        for tensor, result in zip(tensors, results, strict=True):
            if isinstance(result, str):
                problems.append(result)
            else:
                stored[tensor.name].append(result)
    stored = {name: layers for name, layers in stored.items() if layers}
    summaries = tuple(_summarize(name, layers, config) for name, layers in stored.items())
    shapes = {name: layers[0].values.shape for name, layers in stored.items()}
    return Diagnosis("xai", summaries, tuple(problems), shapes, num_layers)


def _read_tensor(path: str) -> StoredTensor | str:
    """The tensor in a file of a release, or a sentence on the damage of the file."""
    try:
        return read_tensor(path)
    except CheckpointError as error:
        return str(error)


def _missing(missing: list[str], count: int) -> list[str]:
    others = f", and {len(missing) - NAMED_FILES} more" if len(missing) > NAMED_FILES else ""
    named = ", ".join(missing[:NAMED_FILES])
    return [f"{len(missing)} of {count} files are missing: {named}{others}."] if missing else []


def _summarize(name: str, layers: list[StoredTensor], config: ModelConfig | None) -> TensorSummary:
    """A release's tensor, of which some layers may be missing."""
    values, scales = layers[0].values, layers[0].scales
    shape = values.shape
    if config is not None and file_shape(spec := param_specs(config)[name]) == shape:
        shape = spec.shape[spec.is_stacked :]
    if any(tensor.name == name and tensor.layer is not None for tensor in tensor_names(1)):
        shape = (len(layers), *shape)
    groups = scales.shape[-2] if scales else None
    nbytes = sum(layer.nbytes for layer in layers)
    return TensorSummary(name, shape, str(values.dtype), groups, nbytes)


def _huggingface(path: str, present: set[str]) -> Diagnosis:
    if INDEX not in present:
        return Diagnosis("huggingface")
    index = read_object(storage.join(path, INDEX)).get("weight_map")
    files = sorted(set(map(str, index.values()))) if isinstance(index, dict) else []
    missing = [file for file in files if file not in present]
    return Diagnosis("huggingface", problems=tuple(_missing(missing, len(files))))


def _import(path: str) -> Diagnosis:
    """An unfinished import, from its journal."""
    journal = storage.join(path, STAGING, JOURNAL)
    try:
        identity, *entries = journal_lines(storage.read_bytes(journal, CheckpointError))
        counts = Counter(entry["name"] for entry in entries)
        facts = identity["tensors"]
        tensors = tuple(
            _imported(name, facts[name], counts[name]) for name in facts if counts[name]
        )
        finished = sum(tensor.bytes for tensor in tensors)
        total = sum(tensor["bytes"] for tensor in facts.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return Diagnosis("orbax", problems=(f"{journal}: is not the journal of an import.",))
    return Diagnosis("orbax", tensors, (f"{finished:,} of {total:,} bytes are imported.",))


def _imported(name: str, facts: dict[str, Any], pieces: int) -> TensorSummary:
    """A tensor of which this number of layers is imported."""
    shape, nbytes = tuple(facts["shape"]), facts["bytes"]
    if facts["layers"] is not None:
        shape, nbytes = (pieces, *shape[1:]), nbytes * pieces // shape[0]
    return TensorSummary(name, shape, facts["dtype"], facts["groups"], nbytes)
