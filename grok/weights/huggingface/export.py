"""Any source of weights -> a Hugging Face folder, streamed, and resumable after a kill. A few
matrices are in memory at a time; a file is renamed when complete, and the index, of a layout that
has one, comes last."""

import dataclasses
import functools
import json
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from grok import storage
from grok.errors import CheckpointError
from grok.locks.folder import hold_folder
from grok.resumable import Journal, check_destination, check_space, continuable
from grok.weights.cast import FloatSource
from grok.weights.huggingface import card as huggingface_card
from grok.weights.huggingface import compressed
from grok.weights.huggingface.adapters import adapter_for_export
from grok.weights.huggingface.adapters.adapter import Adapter, HuggingFaceTensor
from grok.weights.huggingface.compressed import Int4Source
from grok.weights.huggingface.files import CONFIG, INDEX, UNFINISHED
from grok.weights.huggingface.rows import num_workers, quantized_row_blocks, row_blocks
from grok.weights.huggingface.shards import Shard, float_dtype, index_data, plan
from grok.weights.huggingface.source import HuggingFaceSource
from grok.weights.provenance import Provenance, provenance
from grok.weights.source import ByteCounter, OnProgress, Source, no_progress


@dataclasses.dataclass(frozen=True)
class Exported:
    """A finished export: its family, its tensors, their bytes, its files, of which `files_resumed`
    are of an interrupted one; this call wrote `written` bytes of tensors in `seconds`."""

    family: str
    tensors: int
    nbytes: int
    files: int
    files_resumed: int
    written: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class ExportedTokenizer:
    """The files of the weights' tokenizer by name, and its ids under their keys in config.json."""

    contents: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    ids: Mapping[str, int | list[int] | None] = dataclasses.field(default_factory=dict)


NO_TOKENIZER = ExportedTokenizer()


def export_huggingface(
    source: Source,
    folder: str | os.PathLike[str],
    dtype: str = "bfloat16",
    shard_bytes: int | None = None,
    base_weights: str | None = None,
    data_manifest: str | os.PathLike[str] | None = None,
    on_progress: OnProgress = no_progress,
    family: str | None = None,
    tokenizer: ExportedTokenizer = NO_TOKENIZER,
    licence: str | None = None,
) -> Exported:
    """Writes `source` to the local `folder` in "bfloat16", "float16", "float32", "int4" or
    "int4_all", the last two with matrices as `compressed.py` says, and all else in bfloat16.

    The layout is that of `family`, by default the family of a Hugging Face folder or else the first
    that can hold the model. No file is larger than `shard_bytes`, by default 5 GB, but for Grok-2.
    The model card names `base_weights` as the origin and `licence` in place of its own;
    `data_manifest`, a file on the training data, and `tokenizer` are copied. After an interruption
    the same call keeps the files that were finished.

    Raises CheckpointError where `folder` is remote, holds anything else or an interrupted export of
    other weights or settings, and for what cannot be read or written; ConfigError where a tensor
    takes more than `shard_bytes`, and, with the key, for a model that no such folder can hold.
    """
    start = time.monotonic()
    if family is None and isinstance(source, HuggingFaceSource):
        family = source.adapter.name
    adapter = adapter_for_export(source.config, family)
    shards = plan(adapter, source.config, dtype, shard_bytes)
    origin = provenance(source, base_weights)
    small_files = _small_files(source, adapter, dtype, origin, data_manifest, tokenizer, licence)
    small_files |= _index(adapter, shards)
    values = as_exported(source, dtype) if dtype in compressed.PACKED_DTYPES else source
    check_destination(folder, UNFINISHED, CheckpointError)
    path = Path(folder)
    with (
        continuable(folder, CheckpointError),
        hold_folder(folder, CheckpointError, CheckpointError),
    ):
        sizes = storage.list_files(path)
        todo = [shard for shard in shards if sizes.get(shard.file) != shard.file_bytes]
        nbytes, written = (sum(s.data_bytes for s in group) for group in (shards, todo))
        check_space(path, sum(shard.file_bytes for shard in todo), CheckpointError)
        files = {shard.file: shard.file_bytes for shard in shards}
        identity = {"dtype": dtype, "values": origin.checksum, "files": files}
        with Journal(path / UNFINISHED, identity, CheckpointError):
            _write_shards(values, path, todo, ByteCounter(on_progress, nbytes, nbytes - written))
            for name, contents in small_files.items():
                storage.write_bytes(path / name, contents)
            (path / UNFINISHED).unlink()
    tensors, resumed = sum(len(shard.tensors) for shard in shards), len(shards) - len(todo)
    seconds = time.monotonic() - start
    return Exported(adapter.family, tensors, nbytes, len(shards), resumed, written, seconds)


def as_exported(source: Source, dtype: str) -> Source:
    """`source` in the types that an export in `dtype` has. Raises ConfigError where int4 has no
    place for its groups of rows."""
    if dtype in compressed.PACKED_DTYPES:
        return Int4Source(source, dtype)
    return FloatSource(source, float_dtype(dtype))


def _index(adapter: Adapter, shards: list[Shard]) -> dict[str, bytes]:
    """The index, of a layout that has one, by its name."""
    return {} if adapter.num_ranks is not None else {INDEX: json_text(index_data(shards))}


def _small_files(
    source: Source,
    adapter: Adapter,
    dtype: str,
    origin: Provenance,
    data_manifest: str | os.PathLike[str] | None,
    tokenizer: ExportedTokenizer,
    licence: str | None,
) -> dict[str, bytes]:
    """All files without weights but the index, by name."""
    config = adapter.config_data(source.config, float_dtype(dtype).name)
    if dtype in compressed.PACKED_DTYPES:
        config[compressed.KEY] = compressed.quantization_config(adapter, source.config, dtype)
    config |= {key: value for key, value in tokenizer.ids.items() if key in config}
    files = {CONFIG: json_text(config), **tokenizer.contents}
    manifest = None
    if data_manifest is not None:
        name = f"data_manifest{PurePath(data_manifest).suffix}"
        manifest = name, storage.read_bytes(data_manifest, CheckpointError)
        files[name] = manifest[1]
    card = huggingface_card.model_card(
        source, adapter, dtype, origin, manifest, tuple(tokenizer.contents), licence
    )
    return files | {huggingface_card.FILE: card.encode()}


def _write_shards(source: Source, path: Path, todo: list[Shard], counter: ByteCounter) -> None:
    workers = num_workers(source)
    with ThreadPoolExecutor(workers, thread_name_prefix="grok-export") as pool:
        previous: tuple[Path, list[Future]] | None = None
        try:
            for shard in todo:
                partial = path / f"{shard.file}.partial"
                partial.write_bytes(shard.header)
                write = functools.partial(_write_tensor, source, shard, partial, counter)
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
    source: Source,
    shard: Shard,
    file: Path,
    counter: ByteCounter,
    tensor: HuggingFaceTensor,
    offset: int,
) -> None:
    arrays = row_blocks(source, tensor, shard.float_dtype)
    if shard.packs(tensor):
        arrays = _packed(source, tensor)
    with file.open("r+b") as out:
        out.seek(offset)
        for values in arrays:
            out.write(np.ascontiguousarray(values).view(np.uint8).data)
            counter.add(tensor.name, values.nbytes)


def _packed(source: Source, tensor: HuggingFaceTensor) -> Iterator[np.ndarray]:
    """Yields the arrays of `compressed.packed_arrays`, some rows at a time."""
    all_scales = []
    for values, scales in quantized_row_blocks(source, tensor):
        all_scales.append(scales)
        yield compressed.pack(values)
    yield from all_scales
    yield np.array(tensor.shape, np.int64)


def json_text(data: dict[str, Any]) -> bytes:
    """`data` as the JSON files of a folder have it."""
    return f"{json.dumps(data, indent=2)}\n".encode()
