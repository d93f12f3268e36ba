"""int4 values as bytes: two share one, the first of them in its low four bits. In memory, NumPy has
a value in the low four bits of a byte of its own, and zeros above them."""

import ml_dtypes
import numpy as np

INT4 = np.dtype(ml_dtypes.int4)
LOW_BITS = np.uint8(0xF)


def pack(values: np.ndarray) -> np.ndarray:
    """int4 (..., 2n) as uint8 (..., n), of neighbours along the last axis."""
    bits = values.view(np.uint8)
    return bits[..., ::2] | bits[..., 1::2] << 4


def unpack(packed: np.ndarray) -> np.ndarray:
    """The inverse of `pack`."""
    bits = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    bits[..., ::2] = packed & LOW_BITS
    bits[..., 1::2] = packed >> 4
    return bits.view(INT4)
