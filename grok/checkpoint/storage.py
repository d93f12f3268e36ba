"""Files of checkpoints on this machine or at gs://: listed, opened, and read by byte range."""

import contextlib
import functools
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from grok.checkpoint.source import Part, part_shape
from grok.errors import CheckpointError, GrokError


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a URL such as gs://bucket/folder."""
    return "://" in os.fspath(path)


def join(path: str | os.PathLike[str], *names: str) -> str:
    """The path of something inside the folder `path`."""
    return "/".join([os.fspath(path).rstrip("/"), *names])


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file or folder at `path`."""
    if not is_remote(path):
        return Path(path).exists()
    with _reading(path):
        system, inside = _remote(path)
        return system.exists(inside)


def listing(folder: str | os.PathLike[str]) -> dict[str, int | None]:
    """What is in a folder: bytes of each file by name, None for a folder in it.

    Raises CheckpointError where `folder` cannot be listed.
    """
    with _reading(folder):
        if not is_remote(folder):
            with os.scandir(folder) as entries:
                return {entry.name: _size(entry) for entry in entries}
        system, inside = _remote(folder)
        found = {entry["name"]: entry for entry in system.ls(inside, detail=True)}
        if list(found) == [inside.rstrip("/")]:
            raise CheckpointError(f"{folder}: cannot be read: Not a directory.")
        return {
            name.rstrip("/").rsplit("/", 1)[-1]: (
                None if entry["type"] == "directory" else entry["size"]
            )
            for name, entry in found.items()
            # Consoles mark a folder by an empty object of its name.
            if name.rstrip("/") != inside.rstrip("/")
        }


def _size(entry: os.DirEntry[str]) -> int | None:
    try:
        return None if entry.is_dir() else entry.stat().st_size
    except OSError:
        # A link that leads nowhere: whoever needs the file hears of it on opening.
        return entry.stat(follow_symlinks=False).st_size


@contextlib.contextmanager
def open_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """The file for reading; of a remote one, small ranges are fetched as they are asked for.

    Raises CheckpointError where it cannot be opened, or cannot be read inside the `with`.
    """
    with _reading(path):
        if is_remote(path):
            system, inside = _remote(path)
            with system.open(inside, "rb", block_size=1 << 16, cache_type="readahead") as file:
                yield file
            return
        # Opening a pipe would wait for a writer, so look first.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path}: is not a regular file.")
        with open(path, "rb") as file:
            yield file


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """A whole small file. Raises CheckpointError where it cannot be read."""
    with open_file(path) as file:
        return file.read()


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
    read_into(out, path, offset, shape, part)
    return out


def read_into(
    out: np.ndarray,
    path: str | os.PathLike[str],
    offset: int,
    shape: tuple[int, ...],
    part: Part,
) -> None:
    """`read_part` into an array of the part's shape, in C order."""
    assert out.flags.c_contiguous
    starts, length = _runs(shape, out.itemsize, part)
    rows = out.reshape(-1).view(np.uint8).reshape(-1, length)
    with _reading(path):
        if is_remote(path):
            system, inside = _remote(path)
            begin, end = starts[0], starts[-1] + length
            span = system.cat_file(inside, offset + begin, offset + end)
            if len(span) != end - begin:
                raise CheckpointError(f"{path}: became shorter while it was read.")
            for row, start in zip(rows, starts, strict=True):
                row[:] = np.frombuffer(span, np.uint8, length, start - begin)
            return
        with open(path, "rb", buffering=0) as file:
            for row, start in zip(rows, starts, strict=True):
                _read_exactly(file.fileno(), memoryview(row), offset + start, path)


def _runs(shape: tuple[int, ...], itemsize: int, part: Part) -> tuple[list[int], int]:
    """Where each stretch of a C-ordered array begins that `part` covers, and their length.

    Both are in bytes; the stretches are in order, and as long as they can be.
    """
    strides = [itemsize]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    axis = len(shape) - 1
    # Behind the last axis that is cut, everything is taken.
    while axis > 0 and part[axis] == slice(0, shape[axis]):
        axis -= 1
    length = (part[axis].stop - part[axis].start) * strides[axis]
    starts = np.array([part[axis].start * strides[axis]])
    for cut, stride in reversed(list(zip(part[:axis], strides[:axis], strict=True))):
        starts = np.add.outer(np.arange(cut.start, cut.stop) * stride, starts).reshape(-1)
    return starts.tolist(), length


def _read_exactly(descriptor: int, out: memoryview, offset: int, path) -> None:
    while out:
        # One call reads at most 2 GiB.
        count = os.preadv(descriptor, [out[: 1 << 30]], offset)
        if not count:
            raise CheckpointError(f"{path}: became shorter while it was read.")
        out, offset = out[count:], offset + count


def _remote(path: str | os.PathLike[str]) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    url = os.fspath(path)
    if not url.startswith("gs://"):
        raise CheckpointError(f"{path}: is neither on this machine nor at gs://.")
    emulated = "STORAGE_EMULATOR_HOST" in os.environ
    return _google_storage(emulated), url.removeprefix("gs://")


@functools.cache
def _google_storage(emulated: bool) -> Any:
    # Imported late: it takes a second, which local files need not cost.
    from gcsfs.core import GCSFileSystem  # type: ignore[import-untyped]

    # It logs each refusal with a stack trace; what a user should know is raised as well.
    logging.getLogger("gcsfs").addHandler(logging.NullHandler())
    # `gcsfs.GCSFileSystem` would first ask each bucket's layout by gRPC, for minutes where nothing
    # answers. An emulator knows no accounts, and looking for one would ask Google's servers. What
    # was listed is not kept, since others write there.
    return GCSFileSystem(token="anon" if emulated else None, use_listings_cache=False)


@contextlib.contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Says of whatever goes wrong inside that `path` cannot be read, and why."""
    try:
        yield
    except GrokError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {_reason(error)}.") from error
    except Exception as error:
        # What clients of remote storage raise (HTTP, accounts, retries) has no class in common.
        if not is_remote(path):
            raise
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"{path}: cannot be read: {reason}.") from error


def _reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "No such file or directory"
    return error.strerror or str(error) or type(error).__name__
