"""Our own checkpoints as a source: those that runs saved through Orbax, and those of imports."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from grok import storage
from grok.checkpoint.file_list import COMMITTED, FILES, UNFINISHED, check_files
from grok.config import ModelConfig, RunConfig
from grok.config.load import from_dict, load_config
from grok.errors import CheckpointError
from grok.model.params import lora_targets, param_specs, tensor_specs
from grok.ops.weights.lora import LoraArray, merge_adapter
from grok.weights.cast import FloatSource, converted
from grok.weights.checksums import sample_checksum
from grok.weights.orbax.array_tree import ArrayTree
from grok.weights.orbax.metadata import LORA, MODEL, STEP_METADATA, read_meta
from grok.weights.source import Part, Source, TensorSpec
from grok.weights.storage_layout import StorageLayout

# Items of a checkpoint that have no weights of the model.
NO_WEIGHTS = ("optimizer", "ema")


class OrbaxSource(Source):
    """One checkpoint, local or at gs://: a run's folder (its newest), its `checkpoints`, or one
    step's folder. Opening it reads no array.

    The model is `config`, or that of the run's config.yaml, or else of the checkpoint. `step` is
    the step's folder; `checksums` are those of an import, by name and layer (or None). Raises
    CheckpointError, with file and tensor, for what is unfinished, damaged, or of another model.
    """

    format = "orbax"

    def __init__(self, path: str | os.PathLike[str], config: ModelConfig | None = None):
        self.path = os.fspath(path)
        self.step = step_folder(self.path)
        check_files(self.step, NO_WEIGHTS)
        self.meta = meta = read_meta(self.step)
        self.config = config or _config(self.step, meta)
        checksums = meta.get("import", {}).get("checksums", {})
        self.checksums: dict[tuple[str, int | None], str] = {
            (name, layer): checksum
            for name, stored in checksums.items()
            for layer, checksum in (
                [(None, stored)] if isinstance(stored, str) else enumerate(stored)
            )
        }
        self._arrays = ArrayTree(storage.join(self.step, MODEL))
        self.tensors: Mapping[str, TensorSpec] = {
            name: self._arrays.spec(param) for name, param in param_specs(self.config).items()
        }
        self._arrays.check_no_others(self.tensors)

    def read(self, name: str, part: Part) -> np.ndarray:
        """Values of a part."""
        kind = "" if self.tensors[name].groups is None else "/values"
        return self._arrays.read(f"{name}{kind}", part)

    def read_scales(self, name: str, part: Part) -> np.ndarray:
        """Scales of a part."""
        return self._arrays.read(f"{name}/scales", part)

    def layout(self, name: str) -> StorageLayout:
        """The layout of a tensor's values: chunks."""
        kind = "" if self.tensors[name].groups is None else "/values"
        return self._arrays.layout(f"{name}{kind}")

    def scales_layout(self, name: str) -> StorageLayout:
        """The layout of an int8 tensor's scales: chunks."""
        return self._arrays.layout(f"{name}/scales")


class LoraSource(FloatSource):
    """`base` with the adapters of the LoRA run `run` (its config) added, all in float32. Its
    checkpoint, the folder `step`, has their factors alone
    (`lora/layers.attention.w_query_DNH.a`). Raises CheckpointError where `base` is other weights
    than those that the adapters were trained on, and as OrbaxSource does."""

    def __init__(self, step: str, run: RunConfig, base: Source, checksum: str):
        if sample_checksum(base) != checksum:
            raise CheckpointError(
                f"{step}: has adapters of the weights that were at {base.path}, and others are "
                "there now; the same weights would work."
            )
        super().__init__(converted(base, run.model.param_dtype), np.dtype(np.float32))
        self.format, self.path, self.step = "orbax", step, step
        self.run, self.base, self.meta = run, base, read_meta(step)
        self._rank, self._scale = run.lora.rank, run.lora.scale
        self._arrays = ArrayTree(storage.join(step, LORA))
        self._adapted = set(lora_targets(base.config, run.lora))
        specs = tensor_specs(base.config, run.lora).values()
        adapters = [spec for spec in specs if spec.use == "adapter"]
        for spec in adapters:
            self._arrays.spec(spec)
        self._arrays.check_no_others([spec.name for spec in adapters])

    def read(self, name: str, part: Part) -> np.ndarray:
        """Values of a part, with its adapter added."""
        base = super().read(name, part)
        if name not in self._adapted:
            return base
        spec = self.tensors[name].param
        lead, rows, columns = spec.split(part)
        rank = slice(0, self._rank)
        a = self._arrays.read(f"{name}/a", (*lead, *rows, rank))
        b = self._arrays.read(f"{name}/b", (*lead, rank, *columns))
        adapted = LoraArray(base, a, b, self._scale)
        return merge_adapter(adapted, spec.contract_dims, spec.output_dims)

    def layout(self, name: str) -> StorageLayout:
        """That of the base; matrices are multiplied with all of their rows."""
        layout = super().layout(name)
        if name not in self._adapted:
            return layout
        uncut = tuple(self.tensors[name].param.contract_axes)
        return dataclasses.replace(layout, uncut=uncut)


def step_folder(path: str) -> str:
    """The folder of the newest finished step at `path`; CheckpointError where there is none."""
    present = storage.list_files(path, CheckpointError)
    if "checkpoints" in present:
        return step_folder(storage.join(path, "checkpoints"))
    if MODEL in present or LORA in present or STEP_METADATA in present or FILES in present:
        if not _is_finished(path):
            raise CheckpointError(f"{path}: is a checkpoint that was not finished.")
        return path
    for step in sorted((int(name) for name in present if name.isdecimal()), reverse=True):
        if _is_finished(folder := storage.join(path, str(step))):
            return folder
    if ".import" in present:
        raise CheckpointError(
            f"{path}: is an unfinished import; the same `grok import` continues it."
        )
    raise CheckpointError(f"{path}: has no finished checkpoint.")


def _is_finished(step: str) -> bool:
    # Local folders get their names when all is there. Buckets cannot rename them.
    if not storage.is_remote(step):
        return UNFINISHED not in Path(step).name
    return storage.exists(storage.join(step, COMMITTED), CheckpointError)


def _config(step: str, meta: dict[str, Any]) -> ModelConfig:
    beside = Path(step).parent.parent / "config.yaml"
    if not storage.is_remote(step) and beside.is_file():
        return load_config(beside).model
    if "config" not in meta:
        raise CheckpointError(f"{step}: does not say its model; give its config with --config.")
    return from_dict(meta["config"], storage.join(step, "meta", "metadata")).model
