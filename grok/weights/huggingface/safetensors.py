"""The safetensors format: a length (8 bytes, little-endian), a JSON header with the type, shape and
byte range of each tensor, and the data, which the ranges fill without gaps.
https://github.com/huggingface/safetensors#format"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np

from grok import storage
from grok.errors import CheckpointError
from grok.weights.source import parse_object, quoted

TYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
DTYPES: dict[str, np.dtype] = {code: np.dtype(kind) for code, kind in TYPES.items()}
# Of weights that are packed, and of their shapes.
INTEGERS: dict[str, np.dtype] = {"I32": np.dtype(np.int32), "I64": np.dtype(np.int64)}
PACKED_ENDINGS = ("_packed", "_shape")
# Largest header that the format's own library accepts.
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


def read_headers(
    folder: str, files: Sequence[str], sizes: Mapping[str, int | None]
) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of files of a folder, by file; `sizes` has their bytes."""
    storage.prefetch(folder, files, CheckpointError)
    paths = [storage.join(folder, file) for file in files]
    # Sixteen at a time: a remote file takes some round trips.
    with ThreadPoolExecutor(16) as pool:
        headers = list(pool.map(read_header, paths, [sizes[file] or 0 for file in files]))
    return dict(zip(files, headers, strict=True))


def read_header(path: str, size: int) -> dict[str, TensorInfo]:
    """The tensors of a file of `size` bytes, local or at gs://, by name; no data is read. Raises
    CheckpointError, with file and tensor, unless all are of DTYPES, or INTEGERS where the name has
    one of PACKED_ENDINGS, and fill the file."""
    with storage.open_file(path, CheckpointError, storage.HEADER_BLOCK) as file:
        start = file.read(8)
        if start == b"version ":
            pointer = "is a Git LFS pointer, not the file itself; `git lfs pull` gets it."
            raise CheckpointError(f"{path}: {pointer}")
        length = int.from_bytes(start, "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                f"{path}: is cut short, or no safetensors file: it has {size} bytes, and its "
                f"first 8 say that a header of {length} follows them."
            )
        if length > LARGEST_HEADER:
            limit = f"a safetensors file has at most {LARGEST_HEADER}"
            raise CheckpointError(f"{path}: says that its header has {length} bytes; {limit}.")
        header = parse_object(file.read(length), f"{path}: the header")
    header.pop(METADATA, None)
    tensors = {name: _tensor(path, name, 8 + length, entry) for name, entry in header.items()}
    _check_ranges(path, size, 8 + length, tensors)
    return tensors


def header_bytes(tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]]) -> bytes:
    """The beginning of a file whose data are these tensors, in this order."""
    codes = {dtype: code for code, dtype in (DTYPES | INTEGERS).items()}
    # Readers need the framework whose conventions the names follow.
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


def _tensor(path: str, name: str, begin: int, entry: Any) -> TensorInfo:
    """The tensor of a header's entry, with data that begin at byte `begin` of the file."""
    subject = f"{path}: {quoted(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{subject} should have dtype, shape and data_offsets in the header.")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{subject} has a header entry of another form: shape should be a list of sizes, and "
            "data_offsets the bytes where it begins and ends."
        )
    code, nbytes = entry["dtype"], offsets[1] - offsets[0]
    dtypes = INTEGERS if name.endswith(PACKED_ENDINGS) else DTYPES
    if not isinstance(code, str) or code not in dtypes:
        right = f"it should be one of {', '.join(dtypes)}"
        raise CheckpointError(f"{subject} has dtype {code!r:.40}; {right}.")
    tensor = TensorInfo(path, dtypes[code], tuple(shape), begin + offsets[0])
    if nbytes != tensor.nbytes:
        right = f"{code} of shape {shape!s:.100} takes {tensor.nbytes}"
        raise CheckpointError(f"{subject} has {nbytes} bytes, and {right}.")
    return tensor


def _counts(values: Any) -> bool:
    # Sizes of files stay far below 2^63, and products of eight of them are still quick.
    if not isinstance(values, list) or len(values) > 8:
        return False
    return all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _check_ranges(path: str, size: int, begin: int, tensors: dict[str, TensorInfo]) -> None:
    at, before = begin, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != at:
            how = "overlaps" if tensor.offset < at else "leaves a gap after"
            raise CheckpointError(f"{path}: {quoted(name)} {how} {before}; tensors lie end to end.")
        at, before = tensor.offset + tensor.nbytes, quoted(name)
    if at != size:
        problem = "is cut short" if size < at else "has more data than its header names"
        raise CheckpointError(f"{path}: {problem}: it has {size} bytes and should have {at}.")
