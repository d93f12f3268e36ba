"""The adapters of a LoRA run in the layout of the peft library: `adapter_config.json` and
`adapter_model.safetensors`, without the weights that they belong to."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from grok import storage
from grok.checkpoint.file_list import check_files
from grok.config import RunConfig
from grok.config.load import from_dict
from grok.errors import CheckpointError
from grok.model.params import lora_targets
from grok.resumable import check_destination
from grok.weights.huggingface.adapters import adapter_for_export
from grok.weights.huggingface.adapters.adapter import Adapter, HuggingFaceTensor
from grok.weights.huggingface.export import json_text
from grok.weights.huggingface.safetensors import header_bytes
from grok.weights.huggingface.shards import DTYPES
from grok.weights.orbax.array_tree import ArrayTree
from grok.weights.orbax.metadata import LORA, read_meta
from grok.weights.orbax.source import NO_WEIGHTS, step_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# How peft calls the modules of a model inside of its own.
PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class ExportedAdapters:
    """A finished export: the family whose names it has, tensors, trained parameters, and bytes."""

    family: str
    tensors: int
    parameters: int
    nbytes: int


def export_peft(
    src: storage.StrPath,
    folder: str | os.PathLike[str],
    dtype: str = "float32",
    base: str | None = None,
    family: str | None = None,
) -> ExportedAdapters:
    """Writes the adapters of the LoRA run at `src` (its folder, `checkpoints`, or a step), local or
    gs://, to the new local `folder`, under the names of the family's modules. `base` is the name of
    the weights for readers, by default where the run found them.

    Raises CheckpointError for a run without adapters and anything else in `folder`; ConfigError for
    a model that no family holds.
    """
    step = step_folder(os.fspath(src))
    if LORA not in storage.list_files(step, CheckpointError):
        problem = "has weights and no adapters on others"
        raise CheckpointError(f"{step}: {problem}; `grok export hf` writes all weights.")
    check_files(step, NO_WEIGHTS)
    check_destination(folder, CONFIG, CheckpointError)
    meta = read_meta(step)
    run = from_dict(meta["config"], storage.join(step, "meta", "metadata"))
    adapter = adapter_for_export(run.model, family)
    matrices = _matrices(adapter, run)
    arrays = ArrayTree(storage.join(step, LORA))
    path = Path(folder)
    with storage.errors(path, CheckpointError, "cannot be written"):
        path.mkdir(parents=True, exist_ok=True)
        nbytes = _write(path / WEIGHTS, matrices, run.lora.rank, arrays, DTYPES[dtype])
        config = _config(run, matrices, base or meta["init_from"]["path"])
        storage.write_bytes(path / CONFIG, json_text(config))
    parameters = nbytes // DTYPES[dtype].itemsize
    return ExportedAdapters(adapter.family, 2 * len(matrices), parameters, nbytes)


def _matrices(adapter: Adapter, run: RunConfig) -> list[HuggingFaceTensor]:
    """The matrices that have adapters, one for each layer and expert."""
    targets = lora_targets(run.model, run.lora)
    tensors = adapter.tensors(adapter.export_layout, run.model)
    return [tensor for tensor in tensors if tensor.param.name in targets]


def _module(tensor: HuggingFaceTensor) -> str:
    return tensor.name.removesuffix(".weight")


def _config(run: RunConfig, matrices: list[HuggingFaceTensor], base: str) -> dict[str, Any]:
    """The content of adapter_config.json: what our adapters compute, as peft says it."""
    modules = dict.fromkeys(_module(tensor).rpartition(".")[2] for tensor in matrices)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.removeprefix("hf://").partition("@")[0],
        "revision": base.partition("@")[2] or None,
        "r": run.lora.rank,
        "lora_alpha": run.lora.alpha,
        "target_modules": list(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


def _write(
    file: Path, matrices: list[HuggingFaceTensor], rank: int, arrays: ArrayTree, dtype: np.dtype
) -> int:
    """Writes the factors of each matrix, lora_A (rank, in) and lora_B (out, rank), a tensor at a
    time; returns the bytes of their values."""
    names = []
    for tensor in matrices:
        columns, rows = tensor.shape
        module = f"{PREFIX}{_module(tensor)}"
        names.append((f"{module}.lora_A.weight", dtype, (rank, rows)))
        names.append((f"{module}.lora_B.weight", dtype, (columns, rank)))
    header, nbytes = header_bytes(names), 0
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("wb") as out:
        out.write(header)
        for tensor in matrices:
            for values in _factors(tensor, rank, arrays):
                data = np.ascontiguousarray(values, dtype)
                out.write(data.view(np.uint8).data)
                nbytes += data.nbytes
        out.flush()
        os.fsync(out.fileno())
    partial.rename(file)
    return nbytes


def _factors(tensor: HuggingFaceTensor, rank: int, arrays: ArrayTree) -> Iterator[np.ndarray]:
    """Yields the two factors of a matrix, transposed as the matrix is."""
    name, (lead, rows, columns) = tensor.param.name, tensor.param.split(tensor.part)
    ranks = slice(0, rank)
    yield arrays.read(f"{name}/a", (*lead, *rows, ranks)).reshape(-1, rank).T
    yield arrays.read(f"{name}/b", (*lead, ranks, *columns)).reshape(rank, -1).T
