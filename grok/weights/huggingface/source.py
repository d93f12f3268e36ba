"""A Hugging Face folder as a source of our parameters: config.json, safetensors files, an index.
The names of the tensors identify the layout (`adapters/`)."""

import itertools
import math
import os
import re
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from grok import storage
from grok.config import ModelConfig
from grok.errors import CheckpointError
from grok.model.params import param_specs
from grok.weights.huggingface.adapters import ADAPTERS
from grok.weights.huggingface.adapters.adapter import TOKEN_TABLE, Adapter, split_axes
from grok.weights.huggingface.safetensors import TensorInfo, read_header
from grok.weights.source import (
    Part,
    Source,
    TensorSpec,
    blocks,
    part_shape,
    quoted,
    read_object,
    read_part,
)
from grok.weights.transpose import transpose_into

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
# The journal of an unfinished export.
UNFINISHED = "unfinished-export.json"


class HuggingFaceSource(Source):
    """A folder of safetensors, local or at gs://. Opening it reads the headers, and no array.
    `config` is the expected model, by default that of config.json. Raises CheckpointError, with
    file and tensor, where tensors are missing or too many, files damaged, or of another model."""

    format = "huggingface"

    def __init__(self, path: str | os.PathLike[str], config: ModelConfig | None = None):
        self.path = os.fspath(path)
        present = storage.list_files(self.path, CheckpointError)
        entries = _find_tensors(self.path, present)
        adapter, layout = _adapter_of(self.path, entries)
        if config is None and CONFIG not in present:
            missing = storage.join(self.path, CONFIG)
            raise CheckpointError(f"{missing}: is missing; without it a config must be given.")
        self.adapter = adapter
        self.config = config or adapter.read_config(*read_config_json(self.path))
        adapter.config_numbers(self.config)  # raises for a model that no such folder can hold
        whose = "this model's config" if config else f"this folder's {CONFIG}"
        self._entries = self._arrange(layout, whose, entries)
        table = self._entries[TOKEN_TABLE, ()]
        self._tied_head = head = entries.get(adapter.tied_head)
        if head and (head.dtype, head.shape) != (table.dtype, table.shape):
            raise CheckpointError(
                f"{head.path}: {adapter.tied_head} is {head.dtype} {head.shape}, and the token "
                f"table {table.dtype} {table.shape}; {adapter.family} has one table for both."
            )
        dtypes = {tree_name: entry.dtype for (tree_name, _), entry in self._entries.items()}
        self.tensors = {
            name: TensorSpec(spec, dtypes[name]) for name, spec in param_specs(self.config).items()
        }

    def read(self, name: str, part: Part) -> np.ndarray:
        """Values of a part, as they are. CheckpointError if the output layer is another table."""
        out = np.empty(part_shape(part), self.tensors[name].dtype)
        lead, rows, columns = split_axes(self.tensors[name].param, part)
        matrices_ERC = out.reshape([math.prod(part_shape(axes)) for axes in (lead, rows, columns)])
        indices = itertools.product(*(range(s.start, s.stop) for s in lead))
        for one_RC, index in zip(matrices_ERC, indices, strict=True):
            self._read_one(one_RC, name, index, rows, columns)
        if name == TOKEN_TABLE and self._tied_head:
            self._check_tied(self._tied_head, part, out)
        return out

    def _arrange(
        self, layout: str, whose: str, entries: dict[str, TensorInfo]
    ) -> dict[tuple[str, tuple[int, ...]], TensorInfo]:
        """The tensor of each parameter's layer and expert, with its shape and type checked."""
        layers, moe = self.config.num_layers, self.config.moe
        size = f"{whose} has {layers} layers" + (f" of {moe.num_experts} experts" if moe else "")
        arranged: dict[tuple[str, tuple[int, ...]], TensorInfo] = {}
        firsts: dict[str, str] = {}
        expected = {self.adapter.tied_head}
        for tensor in self.adapter.tensors(layout, self.config):
            entry = entries.get(tensor.name)
            if entry is None:
                raise CheckpointError(f"{self.path}: {tensor.name} is missing; {size}.")
            if entry.shape != tensor.shape:
                raise CheckpointError(
                    f"{entry.path}: {tensor.name} has shape {entry.shape}; for {whose} it should "
                    f"be {tensor.shape}."
                )
            first = firsts.setdefault(tensor.param.name, tensor.name)
            if entry.dtype != entries[first].dtype:
                raise CheckpointError(
                    f"{entry.path}: {tensor.name} is {entry.dtype}, and {first} is "
                    f"{entries[first].dtype}; all layers and experts should have one type."
                )
            arranged[tensor.param.name, tensor.lead] = entry
            expected.add(tensor.name)
        extra = min(entries.keys() - expected, default=None)
        if extra is not None:
            path = entries[extra].path
            raise CheckpointError(f"{path}: {quoted(extra)} does not belong here; {size}.")
        return arranged

    def _read_one(self, out_RC: np.ndarray, name: str, index: tuple, rows: Part, columns: Part):
        entry = self._entries[name, index]
        _, row_sizes, column_sizes = split_axes(self.tensors[name].param, self.tensors[name].shape)
        stored = (entry.path, entry.offset, (*column_sizes, *row_sizes))
        if not columns:
            read_part(*stored, rows, out_RC.reshape(part_shape(rows)))
            return
        values_CR = np.empty(part_shape((*columns, *rows)), entry.dtype)
        read_part(*stored, (*columns, *rows), values_CR)
        transpose_into(out_RC, values_CR.reshape(out_RC.shape[::-1]))

    def _check_tied(self, head: TensorInfo, part: Part, table_VD: np.ndarray) -> None:
        spec = self.tensors[TOKEN_TABLE]
        bits = f"u{spec.dtype.itemsize}"
        for block in blocks(spec, part):
            other_VD = np.empty(part_shape(block), spec.dtype)
            read_part(head.path, head.offset, spec.shape, block, other_VD)
            first = block[0].start - part[0].start
            mine_VD = table_VD[first : first + len(other_VD)]
            # As integers, so that a NaN equals itself.
            differs = (mine_VD.view(bits) != other_VD.view(bits)).any(axis=1)
            if differs.any():
                raise CheckpointError(
                    f"{head.path}: {self.adapter.tied_head} differs from the token table, first "
                    f"for token {block[0].start + int(differs.argmax())}; {self.adapter.family} "
                    "has one table for both."
                )


def read_config_json(folder: str) -> tuple[str, dict[str, Any]]:
    """The path and the content of a folder's config.json."""
    path = storage.join(folder, CONFIG)
    return path, read_object(path)


def _adapter_of(folder: str, names: Collection[str]) -> tuple[Adapter, str]:
    for adapter in ADAPTERS:
        if layout := adapter.layout_of(names):
            return adapter, layout
    known = (
        f"{a.family}'s are known in the layouts of {' and '.join(a.layouts)}" for a in ADAPTERS
    )
    raise CheckpointError(
        f"{folder}: its tensors have names of another model, such as {quoted(min(names))}; "
        f"{'; '.join(known)}."
    )


def _find_tensors(folder: str, present: Mapping[str, int | None]) -> dict[str, TensorInfo]:
    """Every tensor of the files that the index lists, or of all where there is no index."""
    if UNFINISHED in present:
        raise CheckpointError(
            f"{folder}: is an unfinished export; the same `grok export hf` again finishes it."
        )
    index = _read_index(storage.join(folder, INDEX)) if INDEX in present else None
    if index is not None:
        files = sorted(set(index.values()))
        for name, file in index.items():
            if present.get(file) is None:
                path, tensor = storage.join(folder, file), quoted(name)
                raise CheckpointError(f"{path}: is missing; the index says that it has {tensor}.")
    else:
        files = sorted(f for f in present if f.endswith(".safetensors") and not f.startswith("."))
        if not files:
            pickles = sorted(name for name in present if name.endswith((".bin", ".pt", ".pth")))
            problem = "has no *.safetensors files."
            if pickles:
                problem = (
                    f"has pickled weights ({pickles[0]}), which cannot be read without executing "
                    "what they say; a copy in safetensors would work."
                )
            raise CheckpointError(f"{folder}: {problem}")
    storage.prefetch(folder, files, CheckpointError)
    # Sixteen at a time: a remote file takes some round trips.
    with ThreadPoolExecutor(16) as pool:
        sizes = [present[file] or 0 for file in files]
        headers = list(pool.map(read_header, [storage.join(folder, f) for f in files], sizes))
    entries: dict[str, TensorInfo] = {}
    for header in headers:
        for name, entry in header.items():
            if name in entries:
                other = f"{entries[name].path} too; it should be in one file"
                raise CheckpointError(f"{entry.path}: {quoted(name)} is in {other}.")
            entries[name] = entry
    if index is not None:
        _check_index(folder, index, entries)
    if not entries:
        raise CheckpointError(f"{folder}: its safetensors files have no tensors.")
    return entries


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
