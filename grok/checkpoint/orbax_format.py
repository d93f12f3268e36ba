"""Orbax's format of checkpoints as runs use it: arrays of zarr 3 in OCDBT databases, each chunk
with a checksum that is made when it leaves for storage, and at the end the list of all files."""

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src.path import atomicity
from orbax.checkpoint._src.serialization import tensorstore_utils

from grok import storage
from grok.checkpoint import file_list
from grok.storage import StrPath
from grok.weights.orbax.zarr import CHECKSUM, TO_BYTES

# Zstandard's own checksum, an XXH64 of the values, costs a third of a CRC-32C.
ZSTD = {"name": "zstd", "configuration": {"level": 1, "checksum": True}}
# Two bits in the head of a chunk have no part in its values, and one of them says that there is a
# checksum: in chunks of fewer bytes, where they weigh more, a CRC-32C covers them too.
SMALL_CHUNK_BYTES = 1 << 20


def tree_handler() -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler of a tree of arrays."""
    return ocp.PyTreeCheckpointHandler(use_zarr3=True)


def _with_checksums(build: Callable[..., Any]) -> Callable[..., Any]:
    """`build`, which makes the spec of an array to write, with checksums of chunks. Chunks are in
    files of their own: what else is in a database is small, and has checksums in `files.json`."""

    @functools.wraps(build)
    def build_with_checksums(*args: Any, **options: Any) -> Any:
        spec = build(*args, **options)
        array = spec.json.get("base", spec.json)
        chunk_bytes = math.prod(spec.metadata.chunk_shape) * np.dtype(spec.metadata.dtype).itemsize
        array["metadata"]["codecs"] = codecs(chunk_bytes)
        array["kvstore"]["value_data_prefix"] = f"{file_list.VALUES}/"
        return spec

    return build_with_checksums


def codecs(chunk_bytes: int) -> list[dict[str, Any]]:
    """The codecs of an array of zarr 3 with chunks of so many bytes of values."""
    return [TO_BYTES, ZSTD, *([CHECKSUM] if chunk_bytes < SMALL_CHUNK_BYTES else [])]


# Orbax has no option for codecs.
tensorstore_utils.build_array_write_spec = _with_checksums(tensorstore_utils.build_array_write_spec)


def _commit(path: atomicity.TemporaryPathBase) -> None:
    # Orbax writes its metadata of the checkpoint in the background.
    path._checkpoint_metadata_store.wait_until_finished()
    file_list.commit(path.get(), int(path.get_final().name))


class _LocalPath(atomicity.AtomicRenameTemporaryPath):
    """A checkpoint, or an item of it, that appears by a rename: a checkpoint with the list of its
    files."""

    async def finalize(self) -> None:
        if _is_item(self):
            await super().finalize()
            return
        _commit(self)
        os.rename(self.get(), self.get_final())


class _BucketPath(atomicity.CommitFileTemporaryPath):
    """A checkpoint, or an item of it, that is finished by a last file: a checkpoint after the list
    of the others."""

    async def finalize(self) -> None:
        if _is_item(self):
            await super().finalize()
            return
        _commit(self)


def _is_item(path: atomicity.TemporaryPathBase) -> bool:
    return not path.get_final().name.isdecimal()


def checkpoint_path(folder: StrPath) -> type[atomicity.TemporaryPathBase]:
    """Orbax's class for the folder of a checkpoint that is being saved in `folder`."""
    return _BucketPath if storage.is_remote(folder) else _LocalPath


class _ReportingFuture:
    """A part of a background save, an Orbax Future, that adds its failure to `failures`."""

    def __init__(self, future, failures: list[Exception]):
        self._future, self._failures = future, failures

    def result(self, timeout: float | None = None) -> Any:
        try:
            return self._future.result(timeout)
        except Exception as error:
            self._failures.append(error)
            raise


def reporting(handler, failures: list[Exception]):
    """`handler`, whose failures to save are added to `failures` at once."""
    save = handler.async_save

    async def async_save(*args, **options):
        return [_ReportingFuture(part, failures) for part in await save(*args, **options) or ()]

    # Orbax knows handlers by their exact class, so a subclass is not possible.
    handler.async_save = async_save
    return handler
