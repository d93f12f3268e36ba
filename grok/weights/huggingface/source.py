"""A Hugging Face folder as a source of our parameters: config.json, safetensors files, an index.
config.json and the names of the tensors identify the family and its layout (`adapters/`)."""

import itertools
import math
import os

import ml_dtypes
import numpy as np

from grok import storage
from grok.config import ModelConfig
from grok.errors import CheckpointError
from grok.model.params import param_specs
from grok.weights.huggingface.adapters import adapter_of_config, layout_of
from grok.weights.huggingface.adapters.adapter import (
    HEAD_NAME,
    TOKEN_TABLE,
    HuggingFaceTensor,
    split_axes,
)
from grok.weights.huggingface.compressed import (
    PackedTensor,
    find_packed,
    packed_names,
    without_quantization,
)
from grok.weights.huggingface.files import CONFIG, find_tensors, read_config_json
from grok.weights.huggingface.ranks import FILE, file_name
from grok.weights.huggingface.safetensors import TensorInfo
from grok.weights.huggingface.stored_tensor import StoredTensor
from grok.weights.source import Part, Source, TensorSpec, blocks, part_shape, quoted, read_part
from grok.weights.storage_layout import StorageLayout
from grok.weights.transpose import transpose_into


class HuggingFaceSource(Source):
    """A folder of safetensors, local or at gs://. Opening it reads the headers, and no array but
    the beginning of each rank's file. `config` is the expected model, by default that of
    config.json. Raises CheckpointError, with file and tensor, where tensors are missing or too
    many, files damaged, or of another model."""

    format = "huggingface"

    def __init__(self, path: str | os.PathLike[str], config: ModelConfig | None = None):
        self.path = os.fspath(path)
        present = storage.list_files(self.path, CheckpointError)
        config_json = read_config_json(self.path) if CONFIG in present else None
        if config_json:
            config_json = config_json[0], without_quantization(*config_json)
        adapter = adapter_of_config(*config_json) if config_json else None
        entries = find_tensors(self.path, present)
        adapter, layout = layout_of(self.path, entries, adapter, config)
        if config is None and config_json is None:
            missing = storage.join(self.path, CONFIG)
            raise CheckpointError(f"{missing}: is missing; without it a config must be given.")
        self.adapter = adapter
        self.config = config or adapter.read_config(*(config_json or ("", {})))
        adapter.check_holds(self.config, reading=True)
        if adapter.ignored is not None:
            ignored = adapter.ignored
            entries = {name: e for name, e in entries.items() if not ignored.fullmatch(name)}
        self._whose = "this model's config" if config else f"this folder's {CONFIG}"
        self._entries = self._arrange(layout, entries)
        self._tied_head = self._find_tied_head(entries) if self.config.tie_embeddings else None
        kinds = {name: (entry.dtype, entry.groups) for (name, _), entry in self._entries.items()}
        self.tensors = {
            name: TensorSpec(spec, *kinds[name]) for name, spec in param_specs(self.config).items()
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

    def read_scales(self, name: str, part: Part) -> np.ndarray:
        """Scales of a part of an int4 matrix."""
        param = self.tensors[name].param
        lead, groups = part[: param.lead_dims], part[param.lead_dims]
        columns, sizes = part[param.lead_dims + 1 :], param.split(param.shape)[2]
        out = np.empty(part_shape(part), np.dtype(ml_dtypes.bfloat16))
        indices = itertools.product(*(range(s.start, s.stop) for s in lead))
        for one, index in zip(out.reshape(-1, *out.shape[len(lead) :]), indices, strict=True):
            entry = self._entries[name, index]
            assert isinstance(entry, PackedTensor)
            one[...] = entry.read_scales(sizes, columns, groups).reshape(one.shape)
        return out

    def scales_layout(self, name: str) -> StorageLayout:
        """The files have scales of int4 transposed, as the matrices."""
        ndim, lead = len(self.tensors[name].scales_shape), self.tensors[name].param.lead_dims
        return StorageLayout((*range(lead), *range(lead + 1, ndim), lead), 2)

    def layout(self, name: str) -> StorageLayout:
        """The files have matrices transposed, columns before rows."""
        spec = self.tensors[name]
        lead, rows, columns = split_axes(spec.param, tuple(range(len(spec.shape))))
        return StorageLayout((*lead, *columns, *rows), spec.dtype.itemsize)

    def _arrange(
        self, layout: str, entries: dict[str, tuple[TensorInfo, ...]]
    ) -> dict[tuple[str, tuple[int, ...]], StoredTensor | PackedTensor]:
        """The tensor of each parameter's layer and expert, with its shape and type checked."""
        arranged: dict[tuple[str, tuple[int, ...]], StoredTensor | PackedTensor] = {}
        firsts: dict[str, tuple[str, StoredTensor | PackedTensor]] = {}
        expected = {HEAD_NAME}
        for tensor in self.adapter.tensors(layout, self.config):
            packed = None
            if tensor.name not in entries and tensor.param.is_matmul:
                packed = find_packed(tensor.name, tensor.shape, entries)
            if tensor.name not in entries and packed is None:
                why = "its output layer is not the token table" if tensor.name == HEAD_NAME else ""
                problem = f"{tensor.name} is missing; {why or self._size()}"
                raise CheckpointError(f"{self.path}: {problem}.")
            entry = packed or self._joined(tensor, entries[tensor.name])
            name, first = firsts.setdefault(tensor.param.name, (tensor.name, entry))
            if (entry.dtype, entry.groups) != (first.dtype, first.groups):
                raise CheckpointError(
                    f"{entry.path}: {tensor.name} is {entry.dtype}, and {name} is "
                    f"{first.dtype}; all layers and experts should have one type."
                )
            arranged[tensor.param.name, tensor.lead] = entry
            expected |= packed_names(tensor.name) if packed else {tensor.name}
        extra = min(entries.keys() - expected, default=None)
        if extra is not None:
            path = entries[extra][0].path
            raise CheckpointError(f"{path}: {quoted(extra)} does not belong here; {self._size()}.")
        return arranged

    def _size(self) -> str:
        layers, moe = self.config.num_layers, self.config.moe
        experts = f" of {moe.num_experts} experts" if moe else ""
        return f"{self._whose} has {layers} layers{experts}"

    def _joined(self, tensor: HuggingFaceTensor, parts: tuple[TensorInfo, ...]) -> StoredTensor:
        """The parts of a tensor as one of the shape that it should have."""
        axis = tensor.rank_axis
        if len(parts) > 1 and axis is None:
            raise CheckpointError(
                f"{parts[0].path}: {tensor.name} is in the files of ranks, and only experts are "
                "split over them."
            )
        entry = StoredTensor(parts, axis or 0)
        if entry.shape == tensor.shape:
            return entry
        path, shape, right = parts[0].path, parts[0].shape, tensor.shape
        if axis is not None and len(shape) == 2 and shape[1 - axis] == right[1 - axis]:
            self._check_number_of_ranks(tensor, parts, axis)
        raise CheckpointError(
            f"{path}: {tensor.name} has shape {entry.shape}; for {self._whose} it should be "
            f"{right}."
        )

    def _check_number_of_ranks(
        self, tensor: HuggingFaceTensor, parts: tuple[TensorInfo, ...], axis: int
    ) -> None:
        """Raises CheckpointError where other ranks than there are would have the right width."""
        number = FILE.fullmatch(os.path.basename(parts[0].path))
        width, size = tensor.shape[axis], parts[0].shape[axis]
        if number is None or number[2] == "common" or width % size:
            return
        ranks, at = width // size, min(width // size, len(parts))
        problem = "is missing" if ranks > len(parts) else "is a rank too many"
        raise CheckpointError(
            f"{storage.join(self.path, file_name(int(number[1]), at))}: {problem}; "
            f"{tensor.name} should have a width of {width}, which {ranks} ranks of {size} have, "
            f"and {len(parts)} are here."
        )

    def _read_one(self, out_RC: np.ndarray, name: str, index: tuple, rows: Part, columns: Part):
        _, row_sizes, column_sizes = split_axes(self.tensors[name].param, self.tensors[name].shape)
        sizes, entry = (*column_sizes, *row_sizes), self._entries[name, index]
        if not columns:
            whole = entry.parts[0]
            read_part(whole.path, whole.offset, sizes, rows, out_RC.reshape(part_shape(rows)))
            return
        for values, place in entry.read(sizes, (*columns, *rows)):
            # Of a tensor in several parts the axes are the matrix's two; another's part is all.
            cut = place[::-1] if len(place) == 2 else ()
            columns_here = math.prod(values.shape[: len(columns)])
            transpose_into(out_RC[cut], values.reshape(columns_here, -1))

    def _find_tied_head(self, entries: dict[str, tuple[TensorInfo, ...]]) -> TensorInfo | None:
        """The copy of the token table that files may have as the output layer."""
        if HEAD_NAME not in entries:
            return None
        head, table = entries[HEAD_NAME][0], self._entries[TOKEN_TABLE, ()]
        if (head.dtype, head.shape) != (table.dtype, table.shape):
            raise CheckpointError(
                f"{head.path}: {HEAD_NAME} is {head.dtype} {head.shape}, and the token table "
                f"{table.dtype} {table.shape}; {self._one_table()}."
            )
        return head

    def _one_table(self) -> str:
        tied = self.adapter.config_json.fixed.get("tie_embeddings")
        return f"{self.adapter.family if tied else self._whose} has one table for both"

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
                    f"{head.path}: {HEAD_NAME} differs from the token table, first for token "
                    f"{block[0].start + int(differs.argmax())}; {self._one_table()}."
                )
