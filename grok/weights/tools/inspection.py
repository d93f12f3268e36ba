"""Inspects the weights at a path: tensors, sizes, config and problems, from headers alone."""

import dataclasses
import os
from typing import Any

from grok.config import ModelConfig
from grok.config.load import load_config, presets
from grok.errors import CheckpointError, ConfigError
from grok.model.params import num_active_parameters, num_parameters, param_specs
from grok.weights.detect import open_source
from grok.weights.huggingface.source import HuggingFaceSource, read_config_json
from grok.weights.orbax.metadata import read_meta
from grok.weights.orbax.source import OrbaxSource
from grok.weights.source import Source
from grok.weights.tools.diagnose import TensorSummary, diagnose
from grok.weights.tools.verify import config_values, differing_key
from grok.weights.xai.source import file_shape

# Origins of the value of a field of the config.
FILES, WITH_HEAD_DIM, ASSUMED = "files", "files, with this head_dim", "assumed"
GIVEN, CONFIG_JSON, STORED = "--config", "config.json", "stored config"
NOT_IN_FILES = (WITH_HEAD_DIM, ASSUMED)
JSON_KEYS = (
    *("path", "format", "dtype", "complete", "problems", "tensors", "parameters", "bytes"),
    *("config", "assumed", "preset", "step", "checksums", "imported_from"),
)
# Fields that follow from the shapes in a release's files; of heads, only their total width does.
IN_RELEASE = {
    **dict.fromkeys(("vocab_size", "num_layers", "embed_dim", "moe.dim", "moe.num_experts"), FILES),
    **dict.fromkeys(("attention.num_heads", "attention.num_kv_heads"), WITH_HEAD_DIM),
}


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The weights at `path`. `problems` are sentences, none where everything is complete.

    `origins` are those of config values; `fitting` presets have the shapes of a release. `step`,
    `checksums` (their number) and `imported_from` are of our own checkpoints only.
    """

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

    @property
    def dtype(self) -> str | None:
        """The type of the matrices."""
        specs = param_specs(self.config) if self.config else {}
        matrices = (
            t for t in self.tensors if t.groups or ((s := specs.get(t.name)) and s.is_matmul)
        )
        return next((tensor.dtype for tensor in matrices), None)

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
        assumed = (name for name, origin in self.origins.items() if origin in NOT_IN_FILES)
        facts = dataclasses.asdict(self) | {
            "dtype": self.dtype,
            "complete": not self.problems,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "assumed": list(assumed),
        }
        return {key: facts[key] for key in JSON_KEYS}


def inspect(path: str | os.PathLike[str], config: ModelConfig | None = None) -> Inspection:
    """Inspects the weights at `path`, in any format; `config` as for `open_source`.

    Reads headers and no weights. Errors become `problems`.
    """
    try:
        source = open_source(path, config)
    except (CheckpointError, ConfigError) as error:
        weights = diagnose(os.fspath(path), config)
        presets = _presets_of_shapes(weights.shapes) if not config and weights.shapes else {}
        fitting = tuple(p for p, model in presets.items() if model.num_layers >= weights.num_layers)
        problems = tuple(dict.fromkeys((str(error), *weights.problems)))
        described = Inspection(os.fspath(path), weights.format, weights.tensors)
        return dataclasses.replace(described, fitting=fitting, problems=problems)
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
        **_checkpoint_facts(source),
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


def _presets_of_shapes(shapes: dict[str, tuple[int, ...]]) -> dict[str, ModelConfig]:
    """The presets whose tensors of these names have these shapes in a release's files."""

    def fits(model: ModelConfig) -> bool:
        return all(file_shape(param_specs(model)[name]) == shape for name, shape in shapes.items())

    return {preset: model for preset, model in _presets().items() if fits(model)}


def _presets() -> dict[str, ModelConfig]:
    """The configs of models, without those for a slice to run on."""
    configs = {name: load_config(file) for name, file in presets().items()}
    return {name: run.model for name, run in configs.items() if not run.plan.topology}


def _origins(source: Source, config: ModelConfig | None) -> dict[str, str]:
    """The origin of each field's value."""
    fields = list(config_values(source.config))
    if config is not None:
        return {name: FILES if IN_RELEASE.get(name) == FILES else GIVEN for name in fields}
    if source.format == "xai":
        return {name: IN_RELEASE.get(name, ASSUMED) for name in fields}
    if isinstance(source, HuggingFaceSource):
        stored = source.adapter.stated_fields(read_config_json(source.path)[1])
        return {name: CONFIG_JSON if name in stored else ASSUMED for name in fields}
    return dict.fromkeys(fields, STORED)


def _checkpoint_facts(source: Source) -> dict[str, Any]:
    """Facts of our own checkpoints: step, checksums, origin of the import."""
    if not isinstance(source, OrbaxSource):
        return {}
    origin = read_meta(source.step).get("import", {})
    return {
        "step": int(source.step.rstrip("/").rpartition("/")[2]),
        "checksums": len(source.checksums),
        "imported_from": origin.get("path"),
    }
