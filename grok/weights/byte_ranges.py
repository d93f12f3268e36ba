"""Files of checkpoints on this machine or at gs://: listed, opened, and read by byte range."""

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from grok import storage
from grok.errors import CheckpointError
from grok.storage import StrPath
from grok.storage import is_remote as is_remote
from grok.storage import join as join
from grok.storage import reason as reason
from grok.weights.source import Part, part_shape


def exists(path: StrPath) -> bool:
    """Whether there is a file or folder at `path`."""
    with _reading(path):
        return storage.exists(path)


def listing(folder: StrPath) -> dict[str, int | None]:
    """What is in a folder: bytes of each file by name, None for a folder in it.

    Raises CheckpointError where `folder` cannot be listed.
    """
    with _reading(folder):
        return storage.list_files(folder)


@contextlib.contextmanager
def open_file(path: StrPath) -> Iterator[BinaryIO]:
    """The file for reading; of a remote one, small ranges are fetched as they are asked for.

    Raises CheckpointError where it cannot be opened, or cannot be read inside the `with`.
    """
    with _reading(path):
        # Opening a pipe would wait for a writer, so look first.
        if not is_remote(path) and not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path}: is not a regular file.")
        with storage.open_file(path, block_size=1 << 16) as file:
            yield file


def read_bytes(path: StrPath) -> bytes:
    """A whole small file. Raises CheckpointError where it cannot be read."""
    with open_file(path) as file:
        return file.read()


def read_part(
    path: StrPath,
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
    path: StrPath,
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
            system, inside = storage.remote(path)
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


@contextlib.contextmanager
def _reading(path: StrPath) -> Iterator[None]:
    """Says of whatever goes wrong inside that `path` cannot be read, and why."""
    try:
        with storage.errors(path):
            yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {storage.reason(error)}.") from error
