"""The safetensors format: the bytes of some tensors behind a JSON header that says where they lie.

A file is the header's length in 8 bytes (little-endian), the header, and the data; the header has
the type, shape and byte range of each tensor. The ranges follow on one another and fill the data.
The format is described at https://github.com/huggingface/safetensors#format.
"""

import dataclasses
import json
import math
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np

from grok import storage
from grok.errors import CheckpointError

DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
# What the format's own library allows for a header.
LARGEST_HEADER = 100_000_000
METADATA = "__metadata__"


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor in C order at byte `offset` of the file `path`."""

    path: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: str, size: int) -> dict[str, TensorInfo]:
    """The tensors of a file of `size` bytes, local or at gs://, by name; no data is read.

    Raises CheckpointError, with the file and the tensor, unless the header is whole and its
    tensors are float32, bfloat16 or float16 and fill the rest of the file exactly.
    """
    with storage.open_file(path, CheckpointError, storage.HEADER_BLOCK) as file:
        start = file.read(8)
        if start == b"version ":
            raise CheckpointError(
                f"{path}: is a Git LFS pointer, not the file itself; `git lfs pull` gets it."
            )
        length = int.from_bytes(start, "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                f"{path}: is cut short, or no safetensors file: it has {size} bytes, and its "
                f"first 8 say that a header of {length} follows them."
            )
        if length > LARGEST_HEADER:
            raise CheckpointError(
                f"{path}: says that its header has {length} bytes; a safetensors file has at "
                f"most {LARGEST_HEADER}."
            )
        header = parse_object(file.read(length), f"{path}: the header")
    header.pop(METADATA, None)
    entries = {name: _entry(path, name, 8 + length, found) for name, found in header.items()}
    _check_ranges(path, size, 8 + length, entries)
    return entries


def header_bytes(tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]]) -> bytes:
    """What a file begins with whose data are these tensors, in this order."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    # Readers want to know which framework's conventions the names follow.
    header: dict[str, Any] = {METADATA: {"format": "pt"}}
    at = 0
    for name, dtype, shape in tensors:
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # The data begin at a multiple of 8 bytes, so that they can be mapped.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `data`. `what` begins the CheckpointError where there is none."""
    try:
        found = json.loads(data.decode(), object_pairs_hook=_unique)
    except RecursionError:
        raise CheckpointError(f"{what} is nested too deeply.") from None
    except ValueError as error:
        raise CheckpointError(f"{what} cannot be read as JSON: {error}.") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{what} should be a JSON object, and is a {type(found).__name__}.")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{quoted(name)} is there twice")
        found[name] = value
    return found


def quoted(name: str) -> str:
    """A name from a file as messages show it: short, and without control characters."""
    return f"{name!r:.100}"


def _entry(path: str, name: str, begin: int, found: Any) -> TensorInfo:
    place = f"{path}: {quoted(name)}"
    if not isinstance(found, dict) or found.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{place} should have dtype, shape and data_offsets in the header.")
    shape, offsets = found["shape"], found["data_offsets"]
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{place} has a header entry of another form: shape should be a list of sizes, and "
            "data_offsets the bytes where it begins and ends."
        )
    if not isinstance(found["dtype"], str) or found["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{place} has dtype {found['dtype']!r:.40}; it should be one of {', '.join(DTYPES)}."
        )
    entry = TensorInfo(path, DTYPES[found["dtype"]], tuple(shape), begin + offsets[0])
    if offsets[1] - offsets[0] != entry.nbytes:
        raise CheckpointError(
            f"{place} has {offsets[1] - offsets[0]} bytes, and {found['dtype']} of shape "
            f"{shape!s:.100} takes {entry.nbytes}."
        )
    return entry


def _counts(values: Any) -> bool:
    # Sizes of files stay far below 2^63, and products of eight of them are still quick.
    return (
        isinstance(values, list)
        and len(values) <= 8
        and all(type(value) is int and 0 <= value < 1 << 63 for value in values)
    )


def _check_ranges(path: str, size: int, begin: int, entries: dict[str, TensorInfo]) -> None:
    at, before = begin, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != at:
            how = "overlaps" if entry.offset < at else "leaves a gap after"
            raise CheckpointError(f"{path}: {quoted(name)} {how} {before}; tensors lie end to end.")
        at, before = entry.offset + entry.nbytes, quoted(name)
    if at != size:
        problem = "is cut short" if size < at else "has more data than its header names"
        raise CheckpointError(f"{path}: {problem}: it has {size} bytes and should have {at}.")
