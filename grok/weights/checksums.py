"""Checksums of weights, independent of formats and files, by piece: a tensor, or a layer of it. A
checksum is xxh3_128 over the bytes of a piece's values in C order, then those of its scales."""

import numpy as np
import xxhash

from grok.weights.source import Part, Source, TensorSpec, blocks, scales_part

ALGORITHM = "xxh3_128"


class PieceChecksum:
    """The checksum of one piece, fed with its blocks in C order."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()
        # Hashed after all values; they are few.
        self._scales: list[np.ndarray] = []

    def update(self, values: np.ndarray, scales: np.ndarray | None = None) -> None:
        """Adds the next block's values and, of int8 values, its scales."""
        self._hash.update(_bytes(values))
        if scales is not None:
            self._scales.append(scales)

    def hexdigest(self) -> str:
        """The checksum of all that was added, 32 hexadecimal digits; nothing may follow."""
        for scales in self._scales:
            self._hash.update(_bytes(scales))
        self._scales.clear()
        return self._hash.hexdigest()


def piece_checksum(source: Source, spec: TensorSpec, part: Part) -> str:
    """The checksum of a piece (`part` is one that `pieces(spec)` gives), read block by block."""
    checksum = PieceChecksum()
    for block in blocks(spec, part):
        values = source.read(spec.name, block)
        if spec.groups is None:
            checksum.update(values)
        else:
            checksum.update(values, source.read_scales(spec.name, scales_part(spec, block)))
    return checksum.hexdigest()


def sample_checksum(source: Source) -> str:
    """A checksum to tell weights apart without reading them all: of the last layer's and expert's
    norms, and first rows of matrices, in their stored types."""
    sample = xxhash.xxh3_128()
    for name, spec in source.tensors.items():
        lead = spec.param.lead_dims if spec.param.is_matmul else int(spec.param.is_stacked)
        inner = [slice(0, size) for size in spec.shape[lead:]]
        if len(inner) > 1:
            inner[0] = slice(0, 1)
        part = (*(slice(size - 1, size) for size in spec.shape[:lead]), *inner)
        sample.update(_bytes(source.read(name, part)))
    return sample.hexdigest()


def _bytes(array: np.ndarray) -> np.ndarray:
    # bfloat16 has no buffer of its own.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
