"""Any source of weights -> a GGUF file, streamed: a few matrices are in memory at a time, and the
file gets its name when it is complete."""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from grok import storage
from grok.errors import CheckpointError, require_package
from grok.resumable import check_space
from grok.weights.gguf import layout
from grok.weights.gguf.blocks import row_blocks_of
from grok.weights.gguf.layout import GGUFTensor
from grok.weights.huggingface.rows import num_workers, row_blocks
from grok.weights.provenance import Provenance, provenance
from grok.weights.source import ByteCounter, OnProgress, Source, no_progress


@dataclasses.dataclass(frozen=True)
class StoredType:
    """A type of tensors: the format's name for it, its number for a file of mostly this type, the
    type that values are converted to first, and the values and bytes of a block."""

    name: str
    file_type: int
    dtype: np.dtype
    block: int = 1
    block_bytes: int = 4


# By our word for the type of the matrices.
TYPES = {
    "float32": StoredType("F32", 0, np.dtype(np.float32)),
    "float16": StoredType("F16", 1, np.dtype(np.float16), block_bytes=2),
    "q8_0": StoredType("Q8_0", 7, np.dtype(np.float32), block=32, block_bytes=34),
    "q4_0": StoredType("Q4_0", 2, np.dtype(np.float32), block=32, block_bytes=18),
    "bfloat16": StoredType("BF16", 32, np.dtype(ml_dtypes.bfloat16), block_bytes=2),
}
# Types of the matrices that are not of MLP or experts, where they have another.
OTHERS = {"q4_0": "q8_0"}
# Of a file without a tokenizer.
NO_TOKENIZER: Mapping[str, Any] = {"tokenizer.ggml.model": "none"}
ALIGNMENT = 32  # bytes; every tensor begins at a multiple


@dataclasses.dataclass(frozen=True)
class Exported:
    """A finished export: the family, llama.cpp's architecture, tensors, bytes of the file, the
    context length that it states, and the seconds that it took."""

    family: str
    architecture: str
    tensors: int
    nbytes: int
    context_length: int
    seconds: float


def export_gguf(
    source: Source,
    file: str | os.PathLike[str],
    dtype: str = "bfloat16",
    tokenizer: Mapping[str, Any] = NO_TOKENIZER,
    base_weights: str | None = None,
    family: str | None = None,
    on_progress: OnProgress = no_progress,
) -> Exported:
    """Writes `source` to the local `file`, with matrices in `dtype`, a key of TYPES, or those of
    OTHERS; norms and the router are float32. `tokenizer` has its keys in the file. int8 and int4
    matrices become q8_0 and q4_0 without another rounding, where a block lies in a group of theirs.

    Raises ConfigError, with the key, for a model that llama.cpp computes in another way or not at
    all, and where the gguf package is missing; CheckpointError where `file` is there already or
    remote, and for what cannot be read or written.
    """
    start = time.monotonic()
    require_package("gguf", "a GGUF file", "gguf")
    adapter, arch = layout.architecture(source.config, family)
    path = _new_file(file)
    tensors = list(layout.tensors(source.config, arch))
    writer = _Writer(source, dtype, tensors)
    partial = path.with_name(f"{path.name}.partial")
    with _removing(partial):
        begin = _write_head(partial, writer, arch, tokenizer, provenance(source, base_weights))
        check_space(path.parent, writer.data_bytes, CheckpointError)
        writer.write(partial, begin, on_progress)
        partial.rename(path)
    nbytes = path.stat().st_size
    context = layout.stated_context(source.config)
    seconds = time.monotonic() - start
    return Exported(adapter.family, arch, len(tensors), nbytes, context, seconds)


def _new_file(file: str | os.PathLike[str]) -> Path:
    if storage.is_remote(file):
        remedy = "which can then be copied, as by `gcloud storage cp`"
        raise CheckpointError(f"{file}: the output goes to a local file, {remedy}.")
    path = Path(file)
    if path.exists():
        raise CheckpointError(f"{path}: is there already; name another file.")
    with storage.errors(path.parent, CheckpointError, "cannot be made"):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def _removing(partial: Path) -> Iterator[None]:
    """Deletes an unfinished file where anything is raised, and makes an OSError one of ours."""
    try:
        with storage.errors(partial, CheckpointError, "cannot be written"):
            yield
    finally:
        partial.unlink(missing_ok=True)


class _Writer:
    """Writes the values of tensors behind a file's head, several at a time."""

    def __init__(self, source: Source, dtype: str, tensors: list[GGUFTensor]) -> None:
        self.source, self.tensors = source, tensors
        self.dtype = dtype

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors, with the gaps between them."""
        return sum(_aligned(self.nbytes(tensor)) for tensor in self.tensors)

    def type_of(self, tensor: GGUFTensor) -> StoredType:
        """The type of a tensor in the file."""
        is_wide = any(part.param.is_wide for part in tensor.parts)
        dtype = self.dtype if is_wide else OTHERS.get(self.dtype, self.dtype)
        stored = TYPES["float32" if tensor.small else dtype]
        # As llama.cpp's own converter has rows that no blocks fill.
        return TYPES["float16"] if tensor.shape[-1] % stored.block else stored

    def nbytes(self, tensor: GGUFTensor) -> int:
        """Bytes of a tensor's values."""
        stored = self.type_of(tensor)
        return math.prod(tensor.shape) // stored.block * stored.block_bytes

    def write(self, path: Path, begin: int, on_progress: OnProgress) -> None:
        """Writes every tensor into the file, of which the first begins at byte `begin`."""
        counter = ByteCounter(on_progress, self.data_bytes)
        os.truncate(path, begin + self.data_bytes)
        with ThreadPoolExecutor(num_workers(self.source), "grok-export") as pool:
            futures = []
            for tensor in self.tensors:
                futures.append(pool.submit(self._write_tensor, path, begin, tensor, counter))
                begin += _aligned(self.nbytes(tensor))
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        with path.open("rb") as file:
            os.fsync(file.fileno())

    def _write_tensor(
        self, path: Path, offset: int, tensor: GGUFTensor, counter: ByteCounter
    ) -> None:
        stored = self.type_of(tensor)
        with path.open("r+b") as file:
            file.seek(offset)
            if tensor.values is not None:
                file.write(tensor.values.data)
            for part in tensor.parts:
                if stored.block > 1:
                    blocks = row_blocks_of(stored.name, self.source, part, tensor.order)
                else:
                    blocks = row_blocks(self.source, part, stored.dtype, tensor.order)
                for data in blocks:
                    file.write(data.view(np.uint8).data)
                    counter.add(tensor.name, data.nbytes)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _write_head(
    path: Path,
    writer: _Writer,
    arch: str,
    tokenizer: Mapping[str, Any],
    origin: Provenance,
) -> int:
    """Writes everything before the values, and returns the byte at which these begin."""
    import gguf

    out = gguf.GGUFWriter(path, arch)
    out.add_name(path.stem.removesuffix(".gguf"))
    out.add_file_type(TYPES[writer.dtype].file_type)
    out.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if origin.licence is not None:
        out.add_license(origin.licence)
    if origin.repository is not None:
        organization, _, name = origin.repository.partition("/")
        out.add_base_model_count(1)
        out.add_base_model_name(0, name)
        out.add_base_model_organization(0, organization)
        out.add_base_model_repo_url(0, f"https://huggingface.co/{origin.repository}")
    sizes = layout.metadata(writer.source.config, arch)
    prefixed = {f"{arch}.{key}": value for key, value in sizes.items()}
    for key, value in {**prefixed, **tokenizer}.items():
        _add(out, key, value)
    for tensor in writer.tensors:
        kind = gguf.GGMLQuantizationType[writer.type_of(tensor).name]
        nbytes = writer.nbytes(tensor)
        out.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes, kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    out.close()
    begin = _aligned(path.stat().st_size)
    os.truncate(path, begin)
    return begin


def _add(out: Any, key: str, value: Any) -> None:
    """Adds a key: integers are unsigned numbers of 32 bits there, and floats have 32 bits."""
    adders = {
        str: out.add_string,
        bool: out.add_bool,
        int: out.add_uint32,
        float: out.add_float32,
        list: out.add_array,
    }
    adders[type(value)](key, value)
