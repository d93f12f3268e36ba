"""Blocks of 32 quantised values and a float16 scale, as GGUF has them along a matrix's inputs:
Q8_0, of int8; and Q4_0, of values plus 8 in four bits, the first sixteen in the lower ones of the
bytes."""

from collections.abc import Iterator

import numpy as np

from grok.errors import CheckpointError
from grok.weights.huggingface.adapters.adapter import HuggingFaceTensor
from grok.weights.huggingface.rows import quantized_row_blocks, row_blocks
from grok.weights.int4 import INT4
from grok.weights.source import Source

BLOCK = 32
# By type of block: that of the values which are stored as they are.
STORED = {"Q8_0": np.dtype(np.int8), "Q4_0": INT4}


def row_blocks_of(
    kind: str, source: Source, tensor: HuggingFaceTensor, order: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Yields a tensor's blocks of a `kind` in order, as `row_blocks` its values: of values of the
    kind's own type as they are, with their scales, and of any others by the nearest that llama.cpp
    would take. Raises CheckpointError for scales that float16 cannot hold."""
    import gguf

    spec = source.tensors[tensor.param.name]
    if spec.groups is None or spec.dtype != STORED[kind] or not _holds_blocks(tensor, spec.groups):
        for values in row_blocks(source, tensor, np.dtype(np.float32), order):
            yield gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
        return
    pack = _q4_0 if kind == "Q4_0" else _q8_0
    for values, scales in quantized_row_blocks(source, tensor, order):
        with np.errstate(over="ignore"):
            halves = scales.astype(np.float16)
        if not np.isfinite(halves).all():
            raise CheckpointError(
                f"{source.path}: {tensor.name} has scales that are not finite in float16; bfloat16 "
                "or float32 would work."
            )
        per_block = np.repeat(halves, values.shape[1] // BLOCK // halves.shape[1], axis=1)
        data = pack(values.reshape(len(values), -1, BLOCK))
        yield np.concatenate([per_block[..., None].view(np.uint8), data], axis=-1)


def _holds_blocks(tensor: HuggingFaceTensor, groups: int) -> bool:
    """True where every block lies in one group of scales."""
    return tensor.shape[-1] // groups % BLOCK == 0


def _q8_0(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint8)


def _q4_0(values: np.ndarray) -> np.ndarray:
    unsigned = (values + 8).astype(np.uint8)
    return unsigned[..., : BLOCK // 2] | unsigned[..., BLOCK // 2 :] << 4
