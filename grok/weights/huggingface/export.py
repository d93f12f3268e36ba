"""Any source of weights -> a Hugging Face folder, streamed, and resumable after a kill.

A few matrices are in memory at a time; a file is renamed when complete, and the index comes last.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePath

import ml_dtypes
import numpy as np

from grok import storage
from grok.errors import CheckpointError
from grok.resumable import Journal, check_destination, check_space, continuable
from grok.weights.checksums import sample_checksum
from grok.weights.huggingface import card as huggingface_card
from grok.weights.huggingface.adapters import EXPORT_ADAPTER
from grok.weights.huggingface.adapters.adapter import HuggingFaceTensor
from grok.weights.huggingface.shard_plan import Shard, index_data, json_text, plan
from grok.weights.huggingface.source import CONFIG, INDEX, UNFINISHED
from grok.weights.source import ByteCounter, OnProgress, Source, blocks, no_progress, scales_part
from grok.weights.transpose import strips

SHARD_BYTES = 5_000_000_000
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
# Most tensors that are read, converted and written at a time, each with one matrix in memory, and
# most bytes of these matrices, which a source may need twice while it reads them.
WORKERS, MATRIX_BYTES = 4, 1 << 31


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
    with ThreadPoolExecutor(_workers(source), thread_name_prefix="grok-export") as pool:
        previous: tuple[Shard, list[Future]] | None = None
        try:
            for shard in todo:
                partial = _partial(path, shard)
                partial.write_bytes(shard.header)
                write = functools.partial(_write_tensor, source, shard.dtype, partial, counter)
                tensors = zip(shard.tensors, shard.offsets, strict=True)
                futures = [pool.submit(write, tensor, offset) for tensor, offset in tensors]
                # Tensors of this file are converted while the previous one goes to disk.
                if previous is not None:
                    _finish(path, *previous)
                previous = shard, futures
            if previous is not None:
                _finish(path, *previous)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _workers(source: Source) -> int:
    sizes = (
        spec.param.contract_size * spec.param.output_size * spec.dtype.itemsize
        for spec in source.tensors.values()
        if spec.param.is_matmul
    )
    return max(1, min(WORKERS, MATRIX_BYTES // max(sizes)))


def _partial(path: Path, shard: Shard) -> Path:
    return path / f"{shard.file}.partial"


def _finish(path: Path, shard: Shard, futures: list[Future]) -> None:
    for future in futures:
        future.result()
    partial = _partial(path, shard)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.rename(path / shard.file)


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
