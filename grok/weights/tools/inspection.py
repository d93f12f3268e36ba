"""Inspects the weights at a path: tensors, sizes, config and problems, from headers alone."""

import dataclasses
import math
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from grok import storage
from grok.config import ModelConfig
from grok.config.load import load_config, presets
from grok.errors import CheckpointError, ConfigError
from grok.model.params import num_active_parameters, num_parameters, param_specs
from grok.resumable import journal_lines
from grok.weights.detect import is_huggingface, is_release, list_files, open_source
from grok.weights.huggingface.files import INDEX, read_config_json
from grok.weights.huggingface.source import HuggingFaceSource
from grok.weights.importing.importer import JOURNAL, STAGING
from grok.weights.orbax.source import LoraSource, OrbaxSource
from grok.weights.source import Source, param_dtype, read_object
from grok.weights.tools.origin import checkpoint_facts
from grok.weights.tools.verify import config_values, differing_key
from grok.weights.xai.objects import StoredTensor
from grok.weights.xai.source import file_shape, tensor_names
from grok.weights.xai.unpickler import read_tensor

# Origins of the value of a field of the config.
FILES, WITH_HEAD_DIM, ASSUMED = "files", "files, with this head_dim", "assumed"
GIVEN, CONFIG_JSON, STORED = "--config", "config.json", "stored config"
FAMILY = "family"  # all of its models have this value
# Fields that follow from the shapes in a release's files; of heads, only their total width does.
IN_RELEASE = {
    **dict.fromkeys(("vocab_size", "num_layers", "embed_dim", "moe.dim", "moe.num_experts"), FILES),
    **dict.fromkeys(("attention.num_heads", "attention.num_kv_heads"), WITH_HEAD_DIM),
}
JSON_KEYS = (
    *("path", "format", "dtype", "complete", "problems", "tensors", "parameters", "bytes"),
    *("config", "assumed", "preset", "step", "checksums", "imported_from", "origin", "adapters"),
)
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
class Inspection:
    """The weights at `path`. `problems` are sentences, none where everything is complete. `origins`
    are those of config values; `fitting` presets have the shapes of a release. `step`, `checksums`
    (their number), `imported_from`, `origin` and `adapters` (of LoRA), both in words, are of our
    own checkpoints only."""

    path: str
    format: str | None
    tensors: tuple[TensorSummary, ...] = ()
    config: ModelConfig | None = None
    origins: dict[str, str] = dataclasses.field(default_factory=dict)
    preset: str | None = None
    fitting: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    step: int | None = None
    checksums: int | None = None
    imported_from: str | None = None
    origin: str | None = None
    adapters: str | None = None

    @property
    def dtype(self) -> str | None:
        """The type of the matrices, as `model.param_dtype` names it."""
        specs = param_specs(self.config) if self.config else {}
        dtypes = [
            t.dtype for t in self.tensors if t.groups or ((s := specs.get(t.name)) and s.is_matmul)
        ]
        return param_dtype(dtypes) if dtypes else None

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def parameters(self) -> dict[str, int] | None:
        """Parameters in total, used by a token, and used by a token without the embedding."""
        if self.config is None:
            return None
        active = num_active_parameters(self.config)
        embedding = self.config.vocab_size * self.config.embed_dim
        return {
            "total": num_parameters(self.config),
            "active": active,
            "active_without_embedding": active - embedding,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data, always with the same keys."""
        unsure = (WITH_HEAD_DIM, ASSUMED)
        facts = dataclasses.asdict(self) | {
            "dtype": self.dtype,
            "complete": not self.problems,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "assumed": [name for name, origin in self.origins.items() if origin in unsure],
        }
        return {key: facts[key] for key in JSON_KEYS}


def inspect(path: str | os.PathLike[str], config: ModelConfig | None = None) -> Inspection:
    """Inspects the weights at `path`, in any format; `config` as for `open_source`. Reads headers
    and no weights. Errors become `problems`."""
    try:
        source = open_source(path, config)
    except (CheckpointError, ConfigError) as error:
        described = _diagnose(os.fspath(path), config)
        problems = tuple(dict.fromkeys((str(error), *described.problems)))
        return dataclasses.replace(described, problems=problems)
    facts: dict[str, Any] = {}
    if isinstance(source, OrbaxSource | LoraSource):
        facts = checkpoint_facts(source)
    return Inspection(
        source.path,
        source.format,
        tuple(
            TensorSummary(spec.name, spec.shape, str(spec.dtype), spec.groups, spec.nbytes)
            for spec in source.tensors.values()
        ),
        source.config,
        _origins(source, config),
        preset_of(source.config),
        _fitting(source, config),
        **facts,
    )


def preset_of(config: ModelConfig) -> str | None:
    """The preset that computes what `config` does, if any."""
    return next((p for p, model in _presets().items() if not differing_key(model, config)), None)


def _fitting(source: Source, config: ModelConfig | None) -> tuple[str, ...]:
    if source.format != "xai" or config is not None:
        return ()
    shapes = {name: file_shape(spec) for name, spec in param_specs(source.config).items()}
    layers, same = source.config.num_layers, preset_of(source.config)
    presets = _presets_of_shapes(shapes)
    return tuple(p for p, model in presets.items() if model.num_layers == layers and p != same)


def _origins(source: Source, config: ModelConfig | None) -> dict[str, str]:
    fields = list(config_values(source.config))
    if config is not None:
        return {name: FILES if IN_RELEASE.get(name) == FILES else GIVEN for name in fields}
    if source.format == "xai":
        return {name: IN_RELEASE.get(name, ASSUMED) for name in fields}
    if isinstance(source, HuggingFaceSource):
        stored = source.adapter.config_json.stated_fields(read_config_json(source.path)[1])
        origins = dict.fromkeys(source.adapter.config_json.fixed, FAMILY)
        origins |= dict.fromkeys(stored, CONFIG_JSON)
        return {name: origins.get(name, ASSUMED) for name in fields}
    return dict.fromkeys(fields, STORED)


def _diagnose(path: str, config: ModelConfig | None = None) -> Inspection:
    """Describes the weights at `path`, which `open_source` refused; raises nothing."""
    try:
        present = set(list_files(path))
        if is_release(present):
            return _release(path, present, config)
        if is_huggingface(present):
            return _huggingface(path, present)
        if STAGING in present:
            return _import(path)
        if "checkpoints" in present or "_CHECKPOINT_METADATA" in present:
            return Inspection(path, "orbax")
    except CheckpointError as error:
        return Inspection(path, None, problems=(str(error),))
    return Inspection(path, None)


def _release(path: str, present: set[str], config: ModelConfig | None) -> Inspection:
    numbers = [int(name[6:11]) for name in present if re.fullmatch(r"tensor\d{5}_000", name)]
    if not numbers:
        return Inspection(path, "xai")
    # The last layer's last file has the number 1 + 12 * num_layers.
    num_layers = config.num_layers if config else max(1, math.ceil((max(numbers) - 1) / 12))
    expected = tensor_names(num_layers)
    tensors = [tensor for tensor in expected if tensor.file in present]
    missing = [str(tensor) for tensor in expected if tensor.file not in present]
    problems = _missing(missing, len(expected))
    stored: dict[str, list[StoredTensor]] = {tensor.name: [] for tensor in tensor_names(1)}
    with ThreadPoolExecutor(16) as pool:
        reads = [pool.submit(read_tensor, storage.join(path, tensor.file)) for tensor in tensors]
        for tensor, read in zip(tensors, reads, strict=True):
            try:
                stored[tensor.name].append(read.result())
            except CheckpointError as error:
                problems.append(str(error))
    stored = {name: layers for name, layers in stored.items() if layers}
    summaries = tuple(_summarize(name, layers, config) for name, layers in stored.items())
    shapes = {name: layers[0].values.shape for name, layers in stored.items()}
    presets = _presets_of_shapes(shapes) if shapes and not config else {}
    fitting = tuple(preset for preset, m in presets.items() if m.num_layers >= num_layers)
    return Inspection(path, "xai", summaries, fitting=fitting, problems=tuple(problems))


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


def _huggingface(path: str, present: set[str]) -> Inspection:
    if INDEX not in present:
        return Inspection(path, "huggingface")
    index = read_object(storage.join(path, INDEX)).get("weight_map")
    files = sorted(set(map(str, index.values()))) if isinstance(index, dict) else []
    missing = [file for file in files if file not in present]
    return Inspection(path, "huggingface", problems=tuple(_missing(missing, len(files))))


def _import(path: str) -> Inspection:
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
        problem = f"{finished:,} of {total:,} bytes are imported."
    except (ValueError, KeyError, TypeError, AttributeError):
        return Inspection(path, "orbax", problems=(f"{journal}: is not the journal of an import.",))
    return Inspection(path, "orbax", tensors, problems=(problem,))


def _imported(name: str, facts: dict[str, Any], pieces: int) -> TensorSummary:
    """A tensor of which this number of layers is imported."""
    shape, nbytes = tuple(facts["shape"]), facts["bytes"]
    if facts["layers"] is not None:
        shape, nbytes = (pieces, *shape[1:]), nbytes * pieces // shape[0]
    return TensorSummary(name, shape, facts["dtype"], facts["groups"], nbytes)


def _presets_of_shapes(shapes: dict[str, tuple[int, ...]]) -> dict[str, ModelConfig]:
    """The presets whose tensors of these names have these shapes in a release's files."""
    return {
        preset: model
        for preset, model in _presets().items()
        if shapes.keys() <= param_specs(model).keys()
        and all(file_shape(param_specs(model)[name]) == shape for name, shape in shapes.items())
    }


def _presets() -> dict[str, ModelConfig]:
    """The configs of models, without those for a slice to run on."""
    configs = {name: load_config(file) for name, file in presets().items()}
    return {name: run.model for name, run in configs.items() if not run.plan.topology}
