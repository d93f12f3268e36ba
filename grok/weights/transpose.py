"""Transposes matrices at memory bandwidth, in tiles: columns would miss the cache at every element.

Letters: C columns, G groups of scales, R rows.
"""

from collections.abc import Iterator

import numpy as np

TILE = 256


def strips(
    values_RC: np.ndarray, dtype: np.dtype, scales_GC: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Yields the transpose of a matrix in `dtype`, some rows (our columns) at a time, in order.
    With scales, values are multiplied by them in float32 and rounded once. Strips share memory."""
    rows, columns = values_RC.shape
    group = rows if scales_GC is None else rows // len(scales_GC)
    # A tile is copied first, since rows of a wide matrix compete for the same cache lines.
    copy = np.empty((TILE, TILE), dtype if scales_GC is None else values_RC.dtype)
    product = np.empty((TILE, TILE), np.float32)
    strip_CR = np.empty((min(TILE, columns), rows), dtype)
    for left in range(0, columns, TILE):
        width = min(TILE, columns - left)
        for first in range(0, rows, group):
            for top in range(first, first + group, TILE):
                height = min(TILE, first + group - top)
                tile, tile_CR = copy[:height, :width], strip_CR[:width, top : top + height]
                _assign(tile, values_RC[top : top + height, left : left + width])
                if scales_GC is None:
                    _assign(tile_CR, tile.T)
                else:
                    scales = scales_GC[first // group, left : left + width, None]
                    tile_CR[...] = np.multiply(tile.T, scales, out=product[:width, :height])
        yield strip_CR[:width]


def _assign(out: np.ndarray, values: np.ndarray) -> None:
    if values.dtype == out.dtype:
        # NumPy copies integers faster than types of other libraries.
        bits = f"u{out.itemsize}"
        out, values = out.view(bits), values.view(bits)
    out[...] = values


def transpose_into(out_CR: np.ndarray, values_RC: np.ndarray) -> None:
    """Writes the transpose of a matrix into an array of its type."""
    top = 0
    for strip_CR in strips(values_RC, out_CR.dtype):
        out_CR[top : top + len(strip_CR)] = strip_CR
        top += len(strip_CR)
