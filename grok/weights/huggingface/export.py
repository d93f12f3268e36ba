"""Any source of weights -> a Hugging Face folder, streamed, and resumable after a kill. A few
matrices are in memory at a time; a file is renamed when complete, and the index comes last."""

import dataclasses
import functools
import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

import ml_dtypes
import numpy as np

from grok import storage
from grok.config import ModelConfig
from grok.errors import CheckpointError, ConfigError
from grok.resumable import Journal, check_destination, check_space, continuable
from grok.weights.checksums import sample_checksum
from grok.weights.huggingface import card as huggingface_card
from grok.weights.huggingface.adapters import EXPORT_ADAPTER
from grok.weights.huggingface.adapters.adapter import Adapter, HuggingFaceTensor
from grok.weights.huggingface.safetensors import header_bytes
from grok.weights.huggingface.source import CONFIG, INDEX, UNFINISHED
from grok.weights.source import ByteCounter, OnProgress, Source, blocks, no_progress, scales_part
from grok.weights.transpose import strips

SHARD_BYTES = 5_000_000_000
# Bytes that bound a header, and its entry for a tensor without the name.
HEADER_OVERHEAD = 128
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
# Most tensors that are read, converted and written at a time, each with one matrix in memory, and
# most bytes of these matrices, which a source may need twice while it reads them.
WORKERS, MATRIX_BYTES = 4, 1 << 31


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


@dataclasses.dataclass(frozen=True)
class Exported:
    """A finished export: its tensors, their bytes, its files, of which `files_resumed` are of an
    interrupted one; this call wrote `written` bytes of tensors in `seconds`."""

    tensors: int
    nbytes: int
    files: int
    files_resumed: int
    written: int
    seconds: float


def export_huggingface(
    source: Source,
    folder: str | os.PathLike[str],
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    base_weights: str | None = None,
    data_manifest: str | os.PathLike[str] | None = None,
    on_progress: OnProgress = no_progress,
) -> Exported:
    """Writes `source` to the local `folder` in "bfloat16" or "float32", no file > `shard_bytes`.

    The model card names `base_weights` as the origin, and `data_manifest`, a file on the training
    data, is copied. After an interruption the same call keeps the files that were finished.

    Raises CheckpointError where `folder` is remote, holds anything else or an interrupted export of
    other weights or settings, and for what cannot be read or written; ConfigError where a tensor
    takes more than `shard_bytes`, and, with the key, for a model that such a folder cannot hold.
    """
    start = time.monotonic()
    adapter = EXPORT_ADAPTER
    config = json_text(adapter.config_data(source.config, dtype))
    shards = plan(adapter, source.config, DTYPES[dtype], shard_bytes)
    manifest = None
    if data_manifest is not None:
        name = f"data_manifest{PurePath(data_manifest).suffix}"
        manifest = name, storage.read_bytes(data_manifest, CheckpointError)
    check_destination(folder, UNFINISHED, CheckpointError)
    path = Path(folder)
    with continuable(folder, CheckpointError):
        path.mkdir(parents=True, exist_ok=True)
        sizes = storage.list_files(path)
        todo = [shard for shard in shards if sizes.get(shard.file) != shard.file_bytes]
        nbytes, written = (sum(s.data_bytes for s in group) for group in (shards, todo))
        check_space(path, sum(shard.file_bytes for shard in todo), CheckpointError)
        files = {shard.file: shard.file_bytes for shard in shards}
        identity = {"dtype": dtype, "values": sample_checksum(source), "files": files}
        with Journal(path / UNFINISHED, identity, CheckpointError):
            _write_shards(source, path, todo, ByteCounter(on_progress, nbytes, nbytes - written))
            card = huggingface_card.model_card(source, adapter, dtype, base_weights, manifest)
            storage.write_bytes(path / CONFIG, config)
            storage.write_bytes(path / huggingface_card.FILE, card.encode())
            if manifest is not None:
                storage.write_bytes(path / manifest[0], manifest[1])
            storage.write_bytes(path / INDEX, json_text(index_data(shards)))
            (path / UNFINISHED).unlink()
    tensors, resumed = sum(len(shard.tensors) for shard in shards), len(shards) - len(todo)
    return Exported(tensors, nbytes, len(shards), resumed, written, time.monotonic() - start)


def _write_shards(source: Source, path: Path, todo: list[Shard], counter: ByteCounter) -> None:
    sizes = (
        spec.param.contract_size * spec.param.output_size * spec.dtype.itemsize
        for spec in source.tensors.values()
        if spec.param.is_matmul
    )
    workers = max(1, min(WORKERS, MATRIX_BYTES // max(sizes)))
    with ThreadPoolExecutor(workers, thread_name_prefix="grok-export") as pool:
        previous: tuple[Path, list[Future]] | None = None
        try:
            for shard in todo:
                partial = path / f"{shard.file}.partial"
                partial.write_bytes(shard.header)
                write = functools.partial(_write_tensor, source, shard.dtype, partial, counter)
                tensors = zip(shard.tensors, shard.offsets, strict=True)
                futures = [pool.submit(write, tensor, offset) for tensor, offset in tensors]
                # Tensors of this file are converted while the previous one goes to disk.
                if previous is not None:
                    _finish(*previous)
                previous = partial, futures
            if previous is not None:
                _finish(*previous)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _finish(partial: Path, futures: list[Future]) -> None:
    for future in futures:
        future.result()
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.rename(partial.with_suffix(""))


def _write_tensor(
    source: Source, dtype: np.dtype, file: Path, counter: ByteCounter, tensor, offset: int
) -> None:
    with file.open("r+b") as out:
        out.seek(offset)
        for values in _row_blocks(source, tensor, dtype):
            out.write(values.view(np.uint8).data)
            counter.add(tensor.name, values.nbytes)


def _row_blocks(source: Source, tensor: HuggingFaceTensor, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Yields the values of a tensor in `dtype` in order, in arrays of some rows each."""
    name = tensor.param.name
    spec = source.tensors[name]
    lead = tuple(slice(index, index + 1) for index in tensor.lead)
    part = (*lead, *spec.full_part[len(lead) :])
    if not tensor.transposed:
        for block in blocks(spec, part):
            yield np.ascontiguousarray(source.read(name, block), dtype)
        return
    scales_GC = None
    columns, rows = tensor.shape
    if spec.groups is not None:
        scales = source.read_scales(name, scales_part(spec, part))
        scales_GC = scales.reshape(-1, columns).astype(np.float32)
    yield from strips(source.read(name, part).reshape(rows, columns), dtype, scales_GC)


def plan(adapter: Adapter, config: ModelConfig, dtype: np.dtype, shard_bytes: int) -> list[Shard]:
    """The files of an export, each of at most `shard_bytes` with all that is in it. Raises
    ConfigError where one tensor alone would take more."""
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
