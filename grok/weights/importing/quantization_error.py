"""Quantisation that measures its rounding error in the same pass."""

import dataclasses
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np

from grok.errors import CheckpointError
from grok.ops.weights.int8 import dequantize, quantize
from grok.weights.cast import QuantizedSource, ScaleGroups, converted, release_groups
from grok.weights.source import Part, Source

# Threads quantise a matrix in stripes of columns of this size, which fits a core's cache.
STRIPE_BYTES = 1 << 21
THREADS = 8


@dataclasses.dataclass(frozen=True)
class RoundingError:
    """Dequantised values q against the floats w before: largest |q - w| and |w|, sums of (q - w)^2
    and of w^2. The errors of disjoint parts add up to the error of all."""

    largest: float = 0.0
    largest_value: float = 0.0
    squares: float = 0.0
    value_squares: float = 0.0

    def __add__(self, other: "RoundingError") -> "RoundingError":
        return RoundingError(
            max(self.largest, other.largest),
            max(self.largest_value, other.largest_value),
            self.squares + other.squares,
            self.value_squares + other.value_squares,
        )

    @property
    def relative(self) -> float:
        """The largest error over the largest value."""
        return self.largest / self.largest_value if self.largest_value else 0.0

    @property
    def relative_rms(self) -> float:
        """Root mean square of the error over that of the values."""
        return math.sqrt(self.squares / self.value_squares) if self.value_squares else 0.0


class MeasuredQuantizedSource(QuantizedSource):
    """A QuantizedSource to read every matrix of once, its values and then immediately its scales.

    `errors` holds the rounding error of what was read, by name and layer.
    """

    def __init__(self, source: Source, groups: ScaleGroups = release_groups):
        super().__init__(source, groups)
        self.errors: dict[tuple[str, int | None], RoundingError] = {}
        self._lock = threading.Lock()
        # The same thread reads scales right after the values.
        self._last = threading.local()

    def _quantize(self, name: str, part: Part) -> tuple[np.ndarray, np.ndarray]:
        last, self._last.matrix = getattr(self._last, "matrix", None), None
        if last is not None and last[0] == (name, part):
            return last[1]
        quantized = self._measured(name, part)
        self._last.matrix = (name, part), quantized
        return quantized

    def _measured(self, name: str, part: Part) -> tuple[np.ndarray, np.ndarray]:
        w = self._source.read(name, part)
        param, groups = self.tensors[name].param, self.tensors[name].groups
        assert groups is not None
        row_dims, col_dims = param.contract_dims, param.output_dims
        columns = w.ndim - col_dims
        values = np.empty(w.shape, np.int8)
        lead, _, column_sizes = param.split(w.shape)
        scales = np.empty((*lead, groups, *column_sizes), ml_dtypes.bfloat16)
        width = max(1, STRIPE_BYTES * w.shape[columns] // (w.size * 4))

        def quantize_stripe(start: int) -> RoundingError:
            after = (slice(None),) * (col_dims - 1)
            cut: Any = (..., slice(start, start + width), *after)
            stripe = w[cut].astype(np.float32)
            if not np.isfinite(stripe).all():
                raise CheckpointError(f"{self.path}: {name} has values that are not finite.")
            q, s = quantize(stripe, groups, row_dims, col_dims)
            values[cut], scales[cut] = q, s
            error = dequantize(q, s, np.float32, row_dims, col_dims)
            error -= stripe
            e, x = error.reshape(-1), stripe.reshape(-1)
            largest, largest_value = float(np.abs(e).max()), float(np.abs(x).max())
            return RoundingError(largest, largest_value, float(e @ e), float(x @ x))

        with ThreadPoolExecutor(THREADS) as pool:
            errors = pool.map(quantize_stripe, range(0, w.shape[columns], width))
            error = sum(errors, RoundingError())
        key = name, part[0].start
        with self._lock:
            self.errors[key] = self.errors.get(key, RoundingError()) + error
        return values, scales


def measured(source: Source, dtype: str, groups: ScaleGroups = release_groups) -> Source:
    """`grok.weights.cast.converted`, with rounding errors where floats become int8."""
    if dtype == "int8" and source.dtype != "int8":
        return MeasuredQuantizedSource(source, groups)
    return converted(source, dtype)
