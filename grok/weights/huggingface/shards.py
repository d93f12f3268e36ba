"""The files of an export: which tensors each has, and the bytes that it begins with."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from grok.config import ModelConfig
from grok.errors import ConfigError
from grok.weights.huggingface import compressed
from grok.weights.huggingface.adapters.adapter import (
    HEAD_NAME,
    TOKEN_TABLE,
    Adapter,
    HuggingFaceTensor,
)
from grok.weights.huggingface.compressed import Array, is_packed, packed_arrays
from grok.weights.huggingface.ranks import file_name
from grok.weights.huggingface.safetensors import header_bytes

SHARD_BYTES = 5_000_000_000
# Bytes that bound a header, and its entry for a tensor without the name.
HEADER_OVERHEAD = 128
TYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float16": np.float16}
DTYPES = {name: np.dtype(kind) for name, kind in TYPES.items()}


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of an export in `dtype`, of TYPES or `compressed.PACKED_DTYPES`: its name, the bytes
    it begins with, its tensors in order."""

    file: str
    header: bytes
    tensors: tuple[HuggingFaceTensor, ...]
    dtype: str

    @property
    def names(self) -> list[str]:
        """Names of its arrays."""
        arrays = (arrays_of(tensor, self.dtype) for tensor in self.tensors)
        return [name for name, _, _ in itertools.chain.from_iterable(arrays)]

    @property
    def float_dtype(self) -> np.dtype:
        """Type of the tensors that are not packed."""
        return float_dtype(self.dtype)

    def packs(self, tensor: HuggingFaceTensor) -> bool:
        """True of a tensor that is packed."""
        return is_packed(tensor.param, self.dtype)

    @property
    def data_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(_nbytes(tensor, self.dtype) for tensor in self.tensors)

    @property
    def file_bytes(self) -> int:
        """Bytes of the file."""
        return len(self.header) + self.data_bytes

    @property
    def offsets(self) -> list[int]:
        """The byte in the file at which each tensor begins."""
        sizes = (_nbytes(tensor, self.dtype) for tensor in self.tensors[:-1])
        return list(itertools.accumulate(sizes, initial=len(self.header)))


def plan(
    adapter: Adapter, config: ModelConfig, dtype: str, shard_bytes: int | None = None
) -> list[Shard]:
    """The files of an export, each of at most `shard_bytes` (default SHARD_BYTES) with all that is
    in it. Raises ConfigError where one tensor alone would take more, for a size where the layout
    says which tensors a file has, and for int4 where ranks split them."""
    if adapter.num_ranks is not None:
        if dtype in compressed.PACKED_DTYPES:
            raise ConfigError(
                f"{adapter.family}'s files are split over ranks, and int4 has no form for them; "
                "--dtype bfloat16 would work."
            )
        if shard_bytes is not None:
            raise ConfigError(
                f"a size of files was given, and {adapter.family} has one kind of tensor in each; "
                "leave it out."
            )
        return [_shard(name, dtype, tensors) for name, tensors in _ranked_files(adapter, config)]
    shard_bytes = SHARD_BYTES if shard_bytes is None else shard_bytes
    groups: list[list[HuggingFaceTensor]] = []
    size = 0
    for tensor in _all_tensors(adapter, config):
        arrays = arrays_of(tensor, dtype)
        nbytes = _nbytes(tensor, dtype) + sum(len(name) + HEADER_OVERHEAD for name, _, _ in arrays)
        if nbytes + HEADER_OVERHEAD > shard_bytes:
            raise ConfigError(
                f"a file of {shard_bytes:,} bytes is too small for {tensor.name}, which is not "
                f"split; {nbytes + HEADER_OVERHEAD:,} would be enough for it."
            )
        if not groups or size + nbytes > shard_bytes:
            groups.append([])
            size = HEADER_OVERHEAD
        groups[-1].append(tensor)
        size += nbytes
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    return [_shard(name, dtype, group) for name, group in zip(names, groups, strict=True)]


def _all_tensors(adapter: Adapter, config: ModelConfig) -> list[HuggingFaceTensor]:
    """The tensors of a family in the order of its files, with the copy of a tied table."""
    tensors = list(adapter.tensors(adapter.export_layout, config))
    if config.tie_embeddings and adapter.copies_tied_head:
        table = next(tensor for tensor in tensors if tensor.param.name == TOKEN_TABLE)
        tensors.append(dataclasses.replace(table, name=HEAD_NAME))
    return tensors


def _ranked_files(
    adapter: Adapter, config: ModelConfig
) -> Iterator[tuple[str, list[HuggingFaceTensor]]]:
    """One kind of tensor a file, in the layout's order; where it is split, a file for each rank."""
    tensors: dict[str, list[HuggingFaceTensor]] = {}
    for tensor in adapter.tensors(adapter.export_layout, config):
        tensors.setdefault(tensor.param.name, []).append(tensor)
    ranks, width = adapter.num_ranks or 1, config.moe.dim if config.moe else 0
    if width % ranks:
        raise ConfigError(
            f"model.moe.dim={width} has no place in a Hugging Face folder of {adapter.family}, "
            f"which needs a multiple of its {ranks} ranks."
        )
    for number, name in enumerate(adapter.layouts[adapter.export_layout].names):
        if tensors[name][0].rank_axis is None:
            yield file_name(number, None), tensors[name]
            continue
        for rank in range(ranks):
            parts = [
                dataclasses.replace(tensor, rank=rank, num_ranks=ranks) for tensor in tensors[name]
            ]
            yield file_name(number, rank), parts


def arrays_of(tensor: HuggingFaceTensor, dtype: str) -> list[Array]:
    """Name, type and shape of the arrays of a tensor in an export in `dtype`, one or several."""
    if is_packed(tensor.param, dtype):
        return packed_arrays(tensor)
    return [(tensor.name, float_dtype(dtype), tensor.shape)]


def float_dtype(dtype: str) -> np.dtype:
    """Type of the tensors of an export in `dtype` that are not packed."""
    return DTYPES["bfloat16" if dtype in compressed.PACKED_DTYPES else dtype]


def _shard(file: str, dtype: str, tensors: list[HuggingFaceTensor]) -> Shard:
    arrays = (arrays_of(tensor, dtype) for tensor in tensors)
    header = header_bytes(itertools.chain.from_iterable(arrays))
    return Shard(file, header, tuple(tensors), dtype)


def index_data(shards: list[Shard]) -> dict[str, Any]:
    """The content of model.safetensors.index.json."""
    return {
        "metadata": {"total_size": sum(shard.data_bytes for shard in shards)},
        "weight_map": {name: shard.file for shard in shards for name in shard.names},
    }


def _nbytes(tensor: HuggingFaceTensor, dtype: str) -> int:
    arrays = arrays_of(tensor, dtype)
    return sum(math.prod(shape) * kind.itemsize for _, kind, shape in arrays)
