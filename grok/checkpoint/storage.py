"""Files of checkpoints on this machine or at gs://: listed, opened, and read by byte range."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np

from grok.checkpoint.source import Part, part_shape
from grok.errors import CheckpointError


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a URL such as gs://bucket/folder."""
    return "://" in os.fspath(path)


def join(path: str | os.PathLike[str], *names: str) -> str:
    """The path of something inside the folder `path`."""
    return "/".join([os.fspath(path).rstrip("/"), *names])


def listing(folder: str | os.PathLike[str]) -> dict[str, int | None]:
    """What is in a folder: bytes of each file by name, None for a folder in it.

    Raises CheckpointError where `folder` cannot be listed.
    """
    try:
        if not is_remote(folder):
            with os.scandir(folder) as entries:
                return {e.name: None if e.is_dir() else e.stat().st_size for e in entries}
        system, inside = _remote(folder)
        system.invalidate_cache()
        return {
            entry["name"].rstrip("/").rsplit("/", 1)[-1]: (
                None if entry["type"] == "directory" else entry["size"]
            )
            for entry in system.ls(inside, detail=True)
            if entry["name"].rstrip("/") != inside.rstrip("/")
        }
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {_reason(error)}.") from error


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """The file for reading; remote files are read in small ranges as they are asked for."""
    if not is_remote(path):
        return open(path, "rb")
    system, inside = _remote(path)
    return system.open(inside, "rb", block_size=1 << 16, cache_type="readahead")


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """A whole small file. Raises CheckpointError where it cannot be read."""
    try:
        with open_file(path) as file:
            return file.read()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {_reason(error)}.") from error


def read_part(
    path: str | os.PathLike[str],
    offset: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
    part: Part,
) -> np.ndarray:
    """Part of an array that lies in C order in the file from byte `offset` on.

    From a local file exactly the bytes of the part are read; from a remote one, where a request
    costs more than the bytes between two runs, everything from its first byte to its last.
    Raises CheckpointError where the file cannot be read or is shorter than it was.
    """
    out = np.empty(part_shape(part), dtype)
    flat = out.reshape(-1).view(np.uint8)
    runs = list(_runs(shape, dtype.itemsize, part))
    try:
        if is_remote(path):
            system, inside = _remote(path)
            begin, end = runs[0][0], runs[-1][0] + runs[-1][1]
            span = system.cat_file(inside, offset + begin, offset + end)
            if len(span) != end - begin:
                raise CheckpointError(f"{path}: became shorter while it was read.")
            whole = np.frombuffer(span, np.uint8)
            at = 0
            for start, length in runs:
                flat[at : at + length] = whole[start - begin : start - begin + length]
                at += length
            return out
        with open(path, "rb", buffering=0) as file:
            at = 0
            for start, length in runs:
                _read_exactly(file.fileno(), flat[at : at + length], offset + start, path)
                at += length
        return out
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {_reason(error)}.") from error


def _runs(shape: tuple[int, ...], itemsize: int, part: Part) -> Iterator[tuple[int, int]]:
    """(start, length) in bytes of each stretch of a C-ordered array that `part` covers."""
    axis = len(shape)
    length = itemsize
    # Axes from the last one on that are taken whole make one stretch with the axis before them.
    while axis and part[axis - 1] == slice(0, shape[axis - 1]):
        axis -= 1
        length *= shape[axis]
    begin, stretch = 0, length
    if axis:
        axis -= 1
        begin = part[axis].start * length
        stretch = (part[axis].stop - part[axis].start) * length
        length *= shape[axis]
    strides = []
    for size in reversed(shape[:axis]):
        strides.append(length)
        length *= size
    strides.reverse()
    for index in np.ndindex(*(s.stop - s.start for s in part[:axis])):
        lead = zip(index, part[:axis], strides, strict=True)
        yield begin + sum((i + s.start) * stride for i, s, stride in lead), stretch


def _read_exactly(descriptor: int, out: np.ndarray, offset: int, path) -> None:
    view = memoryview(out)
    while view:
        # One call reads at most 2 GiB.
        count = os.preadv(descriptor, [view[: 1 << 30]], offset)
        if not count:
            raise CheckpointError(f"{path}: became shorter while it was read.")
        view, offset = view[count:], offset + count


def _remote(path) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(os.fspath(path))
    except (ImportError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be reached: {error}.") from error


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file or folder at `path`."""
    if not is_remote(path):
        return Path(path).exists()
    system, inside = _remote(path)
    return system.exists(inside)
