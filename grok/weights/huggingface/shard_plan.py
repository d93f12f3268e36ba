"""Plans the files of an export to Hugging Face, from the shapes of its tensors."""

import dataclasses
import itertools
import json
import math
from typing import Any

import numpy as np

from grok.config import ModelConfig
from grok.errors import ConfigError
from grok.weights.huggingface.adapters.adapter import Adapter, HuggingFaceTensor
from grok.weights.huggingface.safetensors import header_bytes

# Bytes that bound a header, and its entry for a tensor without the name.
HEADER_OVERHEAD = 128


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of an export: its name, the bytes it begins with, its tensors in order."""

    file: str
    header: bytes
    tensors: tuple[HuggingFaceTensor, ...]
    dtype: np.dtype

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


def plan(adapter: Adapter, config: ModelConfig, dtype: np.dtype, shard_bytes: int) -> list[Shard]:
    """The files of an export, each of at most `shard_bytes` with all that is in it.

    Raises ConfigError where one tensor alone would take more.
    """
    tensors = list(adapter.tensors(adapter.export_layout, config))
    tensors.append(dataclasses.replace(tensors[0], name=adapter.tied_head))
    groups: list[list[HuggingFaceTensor]] = []
    size = 0
    for tensor in tensors:
        nbytes = _nbytes(tensor, dtype) + len(tensor.name) + HEADER_OVERHEAD
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
    headers = [header_bytes((t.name, dtype, t.shape) for t in group) for group in groups]
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    columns = zip(names, headers, map(tuple, groups), strict=True)
    return [Shard(name, header, group, dtype) for name, header, group in columns]


def index_data(shards: list[Shard]) -> dict[str, Any]:
    """The content of model.safetensors.index.json."""
    return {
        "metadata": {"total_size": sum(shard.data_bytes for shard in shards)},
        "weight_map": {tensor.name: shard.file for shard in shards for tensor in shard.tensors},
    }


def json_text(data: dict[str, Any]) -> bytes:
    """`data` as the JSON files of a folder have it."""
    return f"{json.dumps(data, indent=2)}\n".encode()


def _nbytes(tensor: HuggingFaceTensor, dtype: np.dtype) -> int:
    return math.prod(tensor.shape) * dtype.itemsize
