"""What is there of weights that are not complete: as much as can be told of what is no source."""

import dataclasses
import json
import math
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np

from grok import storage
from grok.config import GrokConfig
from grok.errors import CheckpointError
from grok.weights.huggingface.safetensors import parse_object
from grok.weights.huggingface.source import INDEX
from grok.weights.importing.importer import STAGING
from grok.weights.source import TensorSpec
from grok.weights.xai.objects import StoredArray, StoredInt8, StoredTensor
from grok.weights.xai.source import ReleaseTensor, tensor_names, tensor_shapes
from grok.weights.xai.unpickler import read_tensor

DTYPES = {str(d): d for d in map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16, np.int8))}
# How many of the missing are named.
SHOWN = 5


@dataclasses.dataclass(frozen=True)
class TensorSummary:
    """A tensor as it is kept; int8 has `groups` of rows with a scale per column, others None.

    Where weights are incomplete, L in `shape`, and `bytes`, count only the layers that are there.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    groups: int | None
    bytes: int


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What there is: the format, None if none is known, tensors, and sentences on what is wrong.

    `shapes` are those that a release's files have, by parameter, and `num_layers` how many layers
    it has at least; of other formats nothing.
    """

    format: str | None = None
    tensors: tuple[TensorSummary, ...] = ()
    problems: tuple[str, ...] = ()
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    num_layers: int = 0


def diagnose(path: str, config: GrokConfig | None = None) -> Diagnosis:
    """What is at `path` that `open_source` refused; it raises nothing."""
    try:
        present = set(storage.list_files(path, CheckpointError))
        if any(name.startswith("tensor0") for name in present):
            return _release(path, present, config)
        if "config.json" in present or any(name.endswith(".safetensors") for name in present):
            return _huggingface(path, present)
        if STAGING in present:
            return _import(path)
        if "checkpoints" in present or "_CHECKPOINT_METADATA" in present:
            return Diagnosis("orbax")
    except CheckpointError as error:
        return Diagnosis(problems=(str(error),))
    return Diagnosis()


def _release(path: str, present: set[str], config: GrokConfig | None) -> Diagnosis:
    numbers = [int(name[6:11]) for name in present if re.fullmatch(r"tensor\d{5}_000", name)]
    if not numbers:
        return Diagnosis("xai")
    # The last layer's last file has the number 1 + 12 * num_layers.
    num_layers = config.num_layers if config else max(1, math.ceil((max(numbers) - 1) / 12))
    expected = tensor_names(num_layers)
    there = [tensor for tensor in expected if tensor.file in present]
    missing = [_where(tensor) for tensor in expected if tensor.file not in present]
    problems = [_missing(missing, len(expected))] if missing else []
    found: dict[str, list[StoredTensor]] = {tensor.name: [] for tensor in tensor_names(1)}
    with ThreadPoolExecutor(16) as pool:
        records = pool.map(_record, [storage.join(path, tensor.file) for tensor in there])
        for tensor, record in zip(there, records, strict=True):
            if isinstance(record, str):
                problems.append(record)
            else:
                found[tensor.name].append(record)
    found = {name: records for name, records in found.items() if records}
    tensors = tuple(_tensor(name, records, config) for name, records in found.items())
    shapes = {name: _array(records[0]).shape for name, records in found.items()}
    return Diagnosis("xai", tensors, tuple(problems), shapes, num_layers)


def _record(path: str) -> StoredTensor | str:
    """What a release's file holds, or a sentence on what is wrong with it."""
    try:
        return read_tensor(path)
    except CheckpointError as error:
        return str(error)


def _where(tensor: ReleaseTensor) -> str:
    layer = "" if tensor.layer is None else f", layer {tensor.layer}"
    return f"{tensor.file} ({tensor.name}{layer})"


def _missing(missing: list[str], count: int) -> str:
    others = f", and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    named = ", ".join(missing[:SHOWN])
    return f"{len(missing)} of {count} files are missing: {named}{others}."


def _array(record: StoredTensor) -> StoredArray:
    return record.weight if isinstance(record, StoredInt8) else record


def _tensor(name: str, records: list[StoredTensor], config: GrokConfig | None) -> TensorSummary:
    """A release's tensor, of which some layers may be missing."""
    first = records[0]
    shape = _array(first).shape
    if config is not None and tensor_shapes(config)[name].in_file == shape:
        shape = tensor_shapes(config)[name].in_tree
    if name.startswith("layers/"):
        shape = (len(records), *shape)
    groups, nbytes = None, sum(_array(record).nbytes for record in records)
    if isinstance(first, StoredInt8):
        groups = first.scales.shape[-2]
        nbytes += sum(r.scales.nbytes for r in records if isinstance(r, StoredInt8))
    return TensorSummary(name, shape, str(_array(first).dtype), groups, nbytes)


def _huggingface(path: str, present: set[str]) -> Diagnosis:
    if INDEX not in present:
        return Diagnosis("huggingface")
    data = storage.read_bytes(storage.join(path, INDEX), CheckpointError)
    index = parse_object(data, f"{INDEX}:").get("weight_map")
    files = sorted(set(map(str, index.values()))) if isinstance(index, dict) else []
    missing = [file for file in files if file not in present]
    return Diagnosis("huggingface", problems=(_missing(missing, len(files)),) if missing else ())


def _import(path: str) -> Diagnosis:
    """An import that was not finished, by its journal: one line on the weights, one each piece."""
    journal = storage.join(path, STAGING, "journal.jsonl")
    try:
        lines = storage.read_bytes(journal, CheckpointError).splitlines()
        # A kill may have cut the last line short.
        first, *rest = (json.loads(line) for line in lines if line.endswith(b"}"))
        specs = [
            TensorSpec(name, tuple(shape), DTYPES[dtype], groups)
            for name, (shape, dtype, groups) in first["tensors"].items()
        ]
        counts = Counter(line["name"] for line in rest)
        tensors = tuple(_imported(spec, counts[spec.name]) for spec in specs if counts[spec.name])
        finished, total = sum(t.bytes for t in tensors), sum(spec.nbytes for spec in specs)
    except (ValueError, KeyError, TypeError, AttributeError):
        return Diagnosis("orbax", problems=(f"{journal}: is not the journal of an import.",))
    return Diagnosis("orbax", tensors, (f"{finished:,} of {total:,} bytes are imported.",))


def _imported(spec: TensorSpec, pieces: int) -> TensorSummary:
    """A tensor of which so many layers are imported; of one without layers, all."""
    shape, nbytes = spec.shape, spec.nbytes
    if spec.name.startswith("layers/"):
        shape, nbytes = (pieces, *shape[1:]), nbytes * pieces // shape[0]
    return TensorSummary(spec.name, shape, str(spec.dtype), spec.groups, nbytes)
