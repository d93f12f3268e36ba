"""Any source of weights -> a Hugging Face folder in the layout of hpcai-tech/grok-1, streamed.

Which tensor goes where is settled beforehand; then a few matrices are in memory at a time. A file
has its own name once it is whole, and the index comes last, so that an export that was killed can
go on with the files that it had not finished.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

import ml_dtypes
import numpy as np

from grok import storage
from grok.errors import CheckpointError
from grok.weights.checksums import sample_checksum
from grok.weights.huggingface import card as huggingface_card
from grok.weights.huggingface import config_json
from grok.weights.huggingface.adapters.grok_1 import LINEAR, HuggingFaceTensor, split
from grok.weights.huggingface.shard_plan import Shard, index_data, json_text, plan
from grok.weights.huggingface.source import INDEX, UNFINISHED
from grok.weights.source import Source, blocks, scales_part
from grok.weights.transpose import strips

SHARD_BYTES = 5_000_000_000
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
# Tensors that are read, converted and written at a time, each with one matrix in memory: at most so
# many, and so many bytes of matrices, which a source may need twice while it reads them.
WORKERS, MATRIX_BYTES = 4, 1 << 31

# Told of a tensor's name there, the bytes done, and the bytes of the whole export; by several
# threads, one at a time.
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Exported:
    """A finished export: its tensors, their bytes, and its files, `kept` from an earlier try.

    `written` are the bytes of tensors that this call wrote, in `seconds`.
    """

    tensors: int
    nbytes: int
    files: int
    kept: int
    written: int
    seconds: float


def export_huggingface(
    source: Source,
    folder: str | os.PathLike[str],
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    base_weights: str | None = None,
    data_manifest: str | os.PathLike[str] | None = None,
    progress: Progress = lambda name, done, total: None,
) -> Exported:
    """Writes `source` to the local `folder` in "bfloat16" or "float32".

    No file is larger than `shard_bytes`. `base_weights` is what the model card says of where the
    weights came from, and `data_manifest` a file on the training data, which is copied. Called
    again after it was ended in any way, it keeps the files that were finished.

    Raises CheckpointError where `folder` is remote, has anything else in it or cannot be written,
    where an earlier try was of other weights or settings, and for what `source` cannot read;
    ConfigError where `shard_bytes` is less than a tensor takes.
    """
    start = time.monotonic()
    shards = plan(source.config, DTYPES[dtype], shard_bytes)
    manifest = None
    if data_manifest is not None:
        name = f"data_manifest{PurePath(data_manifest).suffix}"
        manifest = name, storage.read_bytes(data_manifest, CheckpointError)
    _check_destination(folder)
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        todo = [shard for shard in shards if not _is_whole(path / shard.file, shard)]
        _check_space(path, todo)
        with _claimed(path, _identity(source, dtype, shards)):
            _write_shards(source, path, todo, _Count(shards, todo, progress))
            config = config_json.config_data(source.config, dtype)
            (path / config_json.FILE).write_text(json_text(config))
            card = huggingface_card.model_card(source, dtype, base_weights, manifest)
            (path / huggingface_card.FILE).write_text(card, encoding="utf-8")
            if manifest is not None:
                (path / manifest[0]).write_bytes(manifest[1])
            (path / INDEX).write_text(json_text(index_data(shards)))
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or folder}: cannot be written: {error.strerror or error}. What is "
            "done is kept; the same command goes on from there."
        ) from error
    return Exported(
        tensors=sum(len(shard.tensors) for shard in shards),
        nbytes=sum(shard.data_bytes for shard in shards),
        files=len(shards),
        kept=len(shards) - len(todo),
        written=sum(shard.data_bytes for shard in todo),
        seconds=time.monotonic() - start,
    )


def _check_destination(folder: str | os.PathLike[str]) -> None:
    if storage.is_remote(folder):
        raise CheckpointError(
            f"{folder}: exports go to a local folder, which can then be copied, as by `gcloud "
            "storage cp --recursive`."
        )
    if not storage.exists(folder, CheckpointError):
        return
    present = storage.list_files(folder, CheckpointError)
    others = sorted(name for name in present if not name.startswith("."))
    if others and UNFINISHED not in present:
        raise CheckpointError(
            f"{folder}: is not empty (it has {others[0]}), and an export goes to a folder of its "
            "own."
        )


def _check_space(path: Path, todo: list[Shard]) -> None:
    left, free = sum(shard.file_bytes for shard in todo), shutil.disk_usage(path).free
    if left > free:
        raise CheckpointError(
            f"{path}: {left:,} bytes are to be written, and the disk has {free:,} free."
        )


def _identity(source: Source, dtype: str, shards: list[Shard]) -> dict[str, Any]:
    """What tells two exports apart, from little of their values; where they lie is no part."""
    files = {shard.file: shard.file_bytes for shard in shards}
    return {"dtype": dtype, "values": sample_checksum(source), "files": files}


@contextlib.contextmanager
def _claimed(path: Path, identity: dict[str, Any]) -> Iterator[None]:
    """Marks the folder as unfinished until the end, if it is not of another export."""
    text = json_text(identity)
    with (path / UNFINISHED).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{path}: another export is writing here; wait for its end."
            ) from None
        file.seek(0)
        found = file.read()
        # A kill may have left the beginning alone, before any other file.
        if not text.startswith(found):
            raise CheckpointError(
                f"{path}: an export of other weights or settings was begun here "
                f"({_differing(found, identity)}); name another folder, or delete this one."
            )
        file.truncate(0)
        file.write(text)
        file.flush()
        yield
        (path / UNFINISHED).unlink()


def _differing(found: str, identity: dict[str, Any]) -> str:
    try:
        other = json.loads(found)
        keys = [key for key in identity if other[key] != identity[key]]
    except (ValueError, TypeError, KeyError):
        return f"{UNFINISHED} is of another program"
    return f"{', '.join(keys)} {'differs' if len(keys) == 1 else 'differ'}"


def _is_whole(file: Path, shard: Shard) -> bool:
    return file.is_file() and file.stat().st_size == shard.file_bytes


class _Count:
    """Counts the bytes written, in any thread, and tells of them."""

    def __init__(self, shards: list[Shard], todo: list[Shard], progress: Progress) -> None:
        self._total, left = (sum(shard.data_bytes for shard in some) for some in (shards, todo))
        self._done = self._total - left
        self._progress, self._lock = progress, threading.Lock()
        self.add("", 0)

    def add(self, name: str, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            self._progress(name, self._done, self._total)


def _write_shards(source: Source, path: Path, todo: list[Shard], count: _Count) -> None:
    with ThreadPoolExecutor(_workers(source), thread_name_prefix="grok-export") as pool:
        try:
            before: list[tuple[Shard, list[Future]]] = []
            for shard in todo:
                partial = _partial(path, shard)
                partial.write_bytes(shard.header)
                futures = [
                    pool.submit(_write_tensor, source, tensor, shard.dtype, partial, offset, count)
                    for tensor, offset in zip(shard.tensors, shard.offsets, strict=True)
                ]
                # The next file is under way while the last one goes to disk.
                for earlier in before:
                    _finish(path, *earlier)
                before = [(shard, futures)]
            for earlier in before:
                _finish(path, *earlier)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _workers(source: Source) -> int:
    sizes = (
        math.prod(spec.shape[len(split(name, spec.shape)[0]) :]) * spec.dtype.itemsize
        for name, spec in source.tensors.items()
        if name in LINEAR
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
    source: Source,
    tensor: HuggingFaceTensor,
    dtype: np.dtype,
    file: Path,
    offset: int,
    count: _Count,
) -> None:
    with file.open("r+b") as out:
        out.seek(offset)
        for values in _parts(source, tensor, dtype):
            out.write(values.view(np.uint8).data)
            count.add(tensor.name, values.nbytes)


def _parts(source: Source, tensor: HuggingFaceTensor, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The values of a tensor in `dtype`, from first to last, in arrays of a few rows each."""
    name = tensor.tree_name
    spec = source.tensors[name]
    lead = tuple(slice(index, index + 1) for index in tensor.lead)
    part = (*lead, *spec.whole[len(lead) :])
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
