"""Values of a tensor as other programs store it, some rows at a time: a matrix is the transpose of
ours, in another type, with int8 and int4 times their scales."""

from collections.abc import Iterator

import numpy as np

from grok.errors import CheckpointError
from grok.weights.cast import FloatSource
from grok.weights.huggingface.adapters.adapter import HuggingFaceTensor
from grok.weights.int4 import INT4
from grok.weights.source import Source, blocks, scales_part
from grok.weights.transpose import strips

# Most tensors that are read, converted and written at a time, each with one matrix in memory, and
# most bytes of these matrices, which a source may need twice while it reads them.
WORKERS, MATRIX_BYTES = 4, 1 << 31


def num_workers(source: Source) -> int:
    """Threads that convert tensors of `source` at a time."""
    sizes = (
        spec.param.contract_size * spec.param.output_size * spec.dtype.itemsize
        for spec in source.tensors.values()
        if spec.param.is_matmul
    )
    return max(1, min(WORKERS, MATRIX_BYTES // max(sizes)))


def row_blocks(
    source: Source, tensor: HuggingFaceTensor, dtype: np.dtype, order: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Yields the values of a tensor in `dtype` in order, in arrays of some rows each. `order` is
    that of the places in a head, the last axis of ours, in the output. Raises CheckpointError for
    values that float16 cannot hold."""
    with np.errstate(over="ignore"):
        for values in _blocks(source, tensor, dtype, order):
            if dtype == np.float16 and not np.isfinite(values).all():
                raise CheckpointError(
                    f"{source.path}: {tensor.name} has values that are not finite in float16; "
                    "bfloat16 or float32 would work."
                )
            yield values


def _blocks(
    source: Source, tensor: HuggingFaceTensor, dtype: np.dtype, order: np.ndarray | None
) -> Iterator[np.ndarray]:
    name, part = tensor.param.name, tensor.part
    spec = source.tensors[name]
    if not tensor.transposed:
        for block in blocks(spec, part):
            yield np.ascontiguousarray(source.read(name, block), dtype)
        return
    scales_GC = None
    columns, rows = tensor.shape
    if spec.groups is not None and tensor.num_ranks > 1:
        # A rank's rows may begin inside of a group of scales.
        source = FloatSource(source, dtype)
    elif spec.groups is not None:
        scales = _ordered(source.read_scales(name, scales_part(spec, part)), order)
        scales_GC = scales.reshape(-1, columns).astype(np.float32)
    values_RC = _ordered(source.read(name, part), order).reshape(rows, columns)
    if values_RC.dtype == INT4:
        values_RC = values_RC.astype(np.int8)  # which NumPy multiplies
    yield from strips(values_RC, dtype, scales_GC)


def quantized_row_blocks(
    source: Source, tensor: HuggingFaceTensor, order: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields a quantised matrix as `row_blocks` does floats: values as int8 (n, in), whose memory
    the next ones take, and their scales, bfloat16 (n, groups)."""
    name, part, (columns, rows) = tensor.param.name, tensor.part, tensor.shape
    scales = source.read_scales(name, scales_part(source.tensors[name], part))
    scales_GC = _ordered(scales, order).reshape(-1, columns)
    values = _ordered(source.read(name, part), order).reshape(rows, columns)
    first = 0
    for strip in strips(values.astype(np.int8, copy=False), np.dtype(np.int8)):
        yield strip, np.ascontiguousarray(scales_GC[:, first : first + len(strip)].T)
        first += len(strip)


def _ordered(values: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    return values if order is None else values[..., order]
