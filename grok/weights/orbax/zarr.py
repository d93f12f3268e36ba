"""Arrays of a checkpoint on disk: zarr 3, as TensorStore and Orbax read it. Those that are written
here, by imports, are not compressed: a shard, a file, is a matrix of one layer and expert, or some
rows of it; a slab is its chunks of the same rows. Each chunk ends with its CRC-32C, which reading
it checks. https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed"""

import dataclasses
import functools
import itertools
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import ml_dtypes
import numpy as np
import tensorstore as ts

from grok import storage
from grok.errors import CheckpointError
from grok.weights.int4 import INT4, pack
from grok.weights.source import Part, TensorSpec

SHARD_BYTES = 1 << 28
# Chunks along an axis, by its letter, where they divide it: about as many as large meshes split.
CHUNKS = {"D": 16, "F": 8, "N": 8, "K": 8, "V": 128}
CRC_BYTES = 4
TO_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
CHECKSUM = {"name": "crc32c"}
# Of TensorStore's errors, those of content that is not as it was written.
DAMAGE = ("DATA_LOSS:", "FAILED_PRECONDITION:", "OUT_OF_RANGE:", "NOT_FOUND:")


@dataclasses.dataclass(frozen=True)
class Slabs:
    """Successive slabs of a shard: their `part` of the array, and byte `offset` in the file."""

    shard: Part
    part: Part
    offset: int


@dataclasses.dataclass(frozen=True)
class ZarrArray:
    """One array of a checkpoint, its shards and chunks; its `name` has the dots of Orbax. int4 is
    stored as uint8, two values along the last axis to a byte."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    shard: tuple[int, ...]
    chunk: tuple[int, ...]

    def shards(self, part: Part) -> Iterator[Part]:
        """Yields the shards of `part`, which it must not cut, in C order."""
        starts = (range(s.start, s.stop, size) for s, size in zip(part, self.shard, strict=True))
        for corner in itertools.product(*starts):
            yield tuple(
                slice(start, start + size) for start, size in zip(corner, self.shard, strict=True)
            )

    def slabs(self, shard: Part, limit: int) -> Iterator[Slabs]:
        """Yields the slabs of a shard in C order, their order in the file. As many together as have
        no more than `limit` bytes, or one."""
        axis = self.slab_axis
        slab_bytes = self.shard_bytes * self.chunk[axis] // self.shard[axis]
        step = max(1, limit // slab_bytes) * self.chunk[axis]
        rows = shard[axis]
        for start in range(rows.start, rows.stop, step):
            cut = slice(start, min(start + step, rows.stop))
            part = (*shard[:axis], cut, *shard[axis + 1 :])
            yield Slabs(shard, part, (start - rows.start) // self.chunk[axis] * slab_bytes)

    @property
    def slab_axis(self) -> int:
        """The axis along which slabs follow each other: the first that a shard has more of."""
        return next((axis for axis, size in enumerate(self.shard) if size > 1), 0)

    def file(self, folder: Path, shard: Part) -> Path:
        """A shard's file, for a checkpoint in `folder`."""
        numbers = (s.start // size for s, size in zip(shard, self.shard, strict=True))
        return folder / self.name / ".".join(["c", *map(str, numbers)])

    @property
    def stored_dtype(self) -> np.dtype:
        """Type of the stored array."""
        return np.dtype(np.uint8) if self.dtype == INT4 else self.dtype

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the array, a shard or a chunk as it is stored."""
        return (*shape[:-1], shape[-1] // 2) if self.dtype == INT4 else shape

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk with its checksum."""
        return math.prod(self.stored_shape(self.chunk)) * self.dtype.itemsize + CRC_BYTES

    @property
    def shard_bytes(self) -> int:
        """Bytes of the chunks of a shard."""
        return math.prod(self.shard) // math.prod(self.chunk) * self.chunk_bytes

    @property
    def file_bytes(self) -> int:
        """Bytes of a shard's file."""
        return self.shard_bytes + len(self.index)

    @functools.cached_property
    def index(self) -> bytes:
        """The end of a shard's file: offset and length of each chunk, and a CRC-32C of these."""
        offsets = np.arange(0, self.shard_bytes, self.chunk_bytes)
        lengths = np.full_like(offsets, self.chunk_bytes)
        index = np.stack([offsets, lengths], axis=1).astype("<u8").tobytes()
        return index + crc32c(index)


def arrays(spec: TensorSpec) -> tuple[ZarrArray, ZarrArray | None]:
    """The arrays of a tensor: of values and, for int8 and int4, of scales. Raises CheckpointError
    for int4 with an odd number of columns."""
    name = spec.name.replace("/", ".")
    lead = spec.param.lead_dims if spec.param.is_matmul else int(spec.param.is_stacked)
    matrix, ones = spec.shape[lead:], (1,) * lead
    # Of a vector, devices need all.
    letters = name.rpartition("_")[2][-len(matrix) :] if len(matrix) > 1 else "-"
    chunk = [
        size // math.gcd(size, CHUNKS.get(letter, 1))
        for size, letter in zip(matrix, letters, strict=True)
    ]
    if spec.dtype == INT4:
        if matrix[-1] % 2:
            raise CheckpointError(
                f"{spec.name} has {matrix[-1]} columns, and a checkpoint stores int4 in pairs; "
                "int8 would work."
            )
        chunk[-1] = matrix[-1] // math.gcd(matrix[-1] // 2, CHUNKS.get(letters[-1], 1))
    if spec.groups is None:
        slab_bytes = chunk[0] * math.prod(matrix[1:]) * spec.dtype.itemsize
        slabs, most = matrix[0] // chunk[0], max(1, SHARD_BYTES // slab_bytes)
        rows = chunk[0] * next(n for n in range(min(slabs, most), 0, -1) if slabs % n == 0)
        shard = (*ones, rows, *matrix[1:])
        return ZarrArray(name, spec.shape, spec.dtype, shard, (*ones, *chunk)), None
    # Scales belong to whole matrices, so a quantised matrix is not cut into several shards.
    values = ZarrArray(f"{name}.values", spec.shape, spec.dtype, (*ones, *matrix), (*ones, *chunk))
    shape = spec.scales_shape
    # Scales are few: those of a layer are one file.
    shard, one = (1, *shape[1:]), (*ones, *shape[lead:])
    return values, ZarrArray(f"{name}.scales", shape, np.dtype(ml_dtypes.bfloat16), shard, one)


def create(folder: Path, array: ZarrArray) -> None:
    """Makes the array in `folder`, without shards, unless it is there. Raises OSError."""
    codecs = [TO_BYTES, CHECKSUM]
    chunk, shard = array.stored_shape(array.chunk), array.stored_shape(array.shard)
    sharding = {"chunk_shape": chunk, "codecs": codecs, "index_codecs": codecs}
    metadata = {
        "shape": array.stored_shape(array.shape),
        "data_type": array.stored_dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    spec = {"driver": "zarr3", "kvstore": _kvstore(folder / array.name), "metadata": metadata}
    wait(ts.open(spec, open=True, create=True))


def write_slabs(folder: Path, array: ZarrArray, slabs: Slabs, values: np.ndarray) -> None:
    """Writes the values of slabs into their shard's file, in order: the first makes the file, and
    the last gives it its full size. Raises OSError."""
    count = values.shape[array.slab_axis] // array.chunk[array.slab_axis]
    values, chunk = pack(values) if array.dtype == INT4 else values, array.stored_shape(array.chunk)
    with open(array.file(folder, slabs.shard), "r+b" if slabs.offset else "wb") as file:
        file.seek(slabs.offset)
        for slab in np.split(values, count, array.slab_axis):
            # Every axis as (chunks, size in a chunk), then the chunks first.
            cut = zip(slab.shape, chunk, strict=True)
            split = slab.reshape([n for size, step in cut for n in (size // step, step)])
            chunks = split.transpose(*range(0, split.ndim, 2), *range(1, split.ndim, 2))
            rows = np.ascontiguousarray(chunks).reshape(-1).view(np.uint8)
            for chunk_bytes in rows.reshape(-1, array.chunk_bytes - CRC_BYTES):
                file.write(chunk_bytes)
                file.write(crc32c(chunk_bytes))
        if file.tell() + len(array.index) == array.file_bytes:
            file.write(array.index)


def crc32c(data: bytes | np.ndarray) -> bytes:
    """The CRC-32C of bytes, as zarr 3 stores it."""
    return google_crc32c.value(data).to_bytes(CRC_BYTES, "little")


def array_context() -> ts.Context:
    """The caches of the arrays of one folder: its index in OCDBT may be large."""
    return ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": 100_000_000}})


def open_array(folder: str, name: str, zarr3: bool, ocdbt: bool, context: ts.Context) -> ts.Future:
    """Begins to open an array in `folder`, local or gs://, for reading; `wait` gives it."""
    if ocdbt:
        kvstore: dict[str, Any] = {"driver": "ocdbt", "base": _kvstore(folder), "path": f"{name}/"}
        kvstore["cache_pool"] = "cache_pool#ocdbt"
    else:
        kvstore = _kvstore(storage.join(folder, name))
    spec: dict[str, Any] = {"driver": "zarr3" if zarr3 else "zarr", "kvstore": kvstore}
    spec["fill_missing_data_reads"] = False
    return ts.open(spec, open=True, read=True, context=context)


class DamagedArrayError(OSError):
    """Bytes of an array, or of its metadata, that are not those that were written."""


def wait(future: Any) -> Any:
    """The result of a future of TensorStore. Raises OSError with a short reason, a
    DamagedArrayError where bytes are not as they were written."""
    try:
        return future.result()
    except ValueError as error:
        kind = DamagedArrayError if str(error).startswith(DAMAGE) else OSError
        raise kind(reason(error)) from error


def reason(error: BaseException) -> str:
    """The cause of an error of TensorStore or of a file, in a few words."""
    if isinstance(error, OSError):
        return storage.reason(error)
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    lines = re.sub("^[A-Z_]+: ", "", str(error)).partition(" [")[0].splitlines()
    return lines[0] if lines else type(error).__name__


def _kvstore(folder: str | os.PathLike[str]) -> dict[str, str]:
    if not storage.is_remote(folder):
        return {"driver": "file", "path": f"{os.path.abspath(folder)}/"}
    scheme, _, rest = os.fspath(folder).partition("://")
    bucket, _, path = rest.partition("/")
    if scheme != "gs":
        raise CheckpointError(f"{folder}: checkpoints are read from local folders and gs://.")
    return {"driver": "gcs", "bucket": bucket, "path": f"{path.rstrip('/')}/"}
