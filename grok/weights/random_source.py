"""Random weights of a model as a source: for tests and benchmarks at any width, with no files.

Values have the sizes of a trained model's: a matrix's deviation is 1/sqrt(rows), the token table's
1/sqrt(embed_dim), and the scales of norms are near one, so that activations stay of order one.
"""

import math
import zlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import as_strided

from grok.config import GrokConfig
from grok.model import params
from grok.weights.cast import RELEASE_GROUPS
from grok.weights.source import Part, Source, TensorSpec, part_shape

# A row is a window into a pool of random values at an offset of its own, which costs a copy and no
# arithmetic. A pool of this many windows lies in a processor's cache.
WINDOWS = 1 << 22
# 2^64 over the golden ratio: multiples of it, modulo 2^64, lie evenly (Knuth, TAOCP 3, 6.4).
GOLDEN = 0x9E3779B97F4A7C15
# Deviation of int8 values; 127 is four times as much, and stands in most columns of thousands.
INT8_DEVIATION = 32


class RandomSource(Source):
    """Random weights of a model; the same for the same `seed`, whichever part is read.

    `dtype` of the matrices is "int8" or "float32"; all else is float32. `groups` is how many groups
    of rows int8 matrices have by name, one where it says nothing, and at most as many as divide
    the rows.
    """

    format = "random"

    def __init__(
        self,
        config: GrokConfig,
        seed: int = 0,
        dtype: str = "int8",
        groups: Mapping[str, int] = RELEASE_GROUPS,
    ):
        self.config, self.path = config, f"random weights of seed {seed}"
        self.tensors = {}
        self._pools, self._scale_pools = {}, {}
        for name, shape in params.shapes(config).items():
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            if dtype == "int8" and name in params.MATRICES:
                rows = _rows(name, shape)
                count = max(g for g in range(1, groups.get(name, 1) + 1) if rows % g == 0)
                spec = TensorSpec(name, shape, np.dtype(np.int8), count)
                values = rng.standard_normal(_pool_size(name, shape), np.float32)
                values = np.clip(np.rint(values * INT8_DEVIATION), -127, 127)
                scales = rng.uniform(0.8, 1.2, _pool_size(name, spec.scales_shape))
                scales /= INT8_DEVIATION * math.sqrt(rows)
                self._scale_pools[name] = scales.astype(ml_dtypes.bfloat16)
            else:
                spec = TensorSpec(name, shape, np.dtype(np.float32))
                values = rng.standard_normal(_pool_size(name, shape), np.float32)
                values *= np.float32(_deviation(name, shape))
                if name.endswith("norm/scale_D"):
                    values += 1
            self.tensors[name] = spec
            self._pools[name] = values.astype(spec.dtype)

    def read(self, name: str, part: Part) -> np.ndarray:
        """Values of a part."""
        return _windows(self._pools[name], name, self.tensors[name].shape, part)

    def read_scales(self, name: str, part: Part) -> np.ndarray:
        """Scales of a part."""
        return _windows(self._scale_pools[name], name, self.tensors[name].scales_shape, part)


def _rows(name: str, shape: tuple[int, ...]) -> int:
    return math.prod(params.rows_and_columns(name, shape)[1])


def _deviation(name: str, shape: tuple[int, ...]) -> float:
    if name in params.MATRICES:
        return 1 / math.sqrt(_rows(name, shape))
    if name.endswith("norm/scale_D"):
        return 0.1
    embed_dim = shape[-2] if name == "layers/moe/router_DE" else shape[-1]
    return 1 / math.sqrt(embed_dim)


def _columns(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The last axes, which lie in one window."""
    return shape[-params.MATRICES[name].col_dims if name in params.MATRICES else -1 :]


def _pool_size(name: str, shape: tuple[int, ...]) -> int:
    # For small models, about as many values as the tensor has.
    columns = math.prod(_columns(name, shape))
    return min(WINDOWS, math.prod(shape)) + columns


def _windows(pool: np.ndarray, name: str, shape: tuple[int, ...], part: Part) -> np.ndarray:
    """The part of a tensor whose rows are windows of `pool`."""
    columns = _columns(name, shape)
    lead = len(shape) - len(columns)
    count = pool.size - math.prod(columns)
    strides = [pool.itemsize * math.prod(columns[axis + 1 :]) for axis in range(len(columns))]
    windows = as_strided(pool, (count, *columns), (pool.itemsize, *strides), writeable=False)
    rows = np.zeros(1, np.uint64)
    for size, cut in zip(shape[:lead], part[:lead], strict=True):
        inner = np.arange(cut.start, cut.stop, dtype=np.uint64)
        rows = np.add.outer(rows * np.uint64(size), inner).reshape(-1)
    places = rows * np.uint64(GOLDEN) >> np.uint64(32)
    offsets = places * np.uint64(count) >> np.uint64(32)
    return windows[(slice(None), *part[lead:])][offsets].reshape(part_shape(part))
