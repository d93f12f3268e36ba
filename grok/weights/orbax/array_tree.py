"""The arrays of an item of a checkpoint, such as `model`, read in parts."""

import itertools
from collections.abc import Collection, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from grok.errors import CheckpointError, DamageError
from grok.model.param_spec import ParamSpec
from grok.weights.int4 import INT4, unpack
from grok.weights.orbax.metadata import read_tree
from grok.weights.orbax.zarr import DamagedArrayError, array_context, open_array, wait
from grok.weights.source import Part, TensorSpec
from grok.weights.storage_layout import StorageLayout

FLOATS = tuple(np.dtype(kind) for kind in (np.float32, ml_dtypes.bfloat16, np.float16))


class ArrayTree:
    """The arrays of a tree in `folder`, by names with slashes, opened at once. What is read is
    compared with its checksums. Arrays of uint8 are int4, two values along the last axis to a byte.
    Raises CheckpointError, naming folder and tensor, for what cannot be read, and DamageError where
    it is not as it was written."""

    def __init__(self, folder: str):
        self.folder = folder
        names, zarr3, ocdbt = read_tree(folder)
        context = array_context()
        opening = {n.replace(".", "/"): open_array(folder, n, zarr3, ocdbt, context) for n in names}
        self._stores = {name: self._wait(name, future) for name, future in opening.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array."""
        return {name: self._shape(name) for name in self._stores}

    @property
    def nbytes(self) -> int:
        """Bytes of the values of all arrays."""
        sizes = (store.dtype.numpy_dtype.itemsize * store.size for store in self._stores.values())
        return sum(sizes)

    def chunks(self, name: str) -> Iterator[Part]:
        """Yields the parts of an array that have a checksum each."""
        shape = self._shape(name)
        steps = self.layout(name).chunk or (1,) * len(shape)
        starts = [range(0, size, step) for size, step in zip(shape, steps, strict=True)]
        for corner in itertools.product(*starts):
            bounds = zip(corner, steps, shape, strict=True)
            yield tuple(slice(start, min(start + n, size)) for start, n, size in bounds)

    def spec(self, param: ParamSpec) -> TensorSpec:
        """The spec of the stored tensor of a parameter."""
        name, shape = param.name, param.shape
        if f"{name}/values" not in self._stores:
            return TensorSpec(param, self._check(name, shape, FLOATS))
        dtype = self._check(f"{name}/values", shape, (np.dtype(np.int8), INT4))
        scales_shape = self._store(f"{name}/scales").shape
        axis = param.lead_dims if param.is_matmul else 0
        groups = scales_shape[axis] if axis < len(scales_shape) else 1
        spec = TensorSpec(param, dtype, groups)
        self._check(f"{name}/scales", spec.scales_shape, (np.dtype(ml_dtypes.bfloat16),))
        rows = param.contract_size
        if rows % groups:
            raise CheckpointError(
                f"{self.folder}: {name} has {groups} groups of scales, and {rows} rows for them."
            )
        return spec

    def check_no_others(self, expected: Collection[str]) -> None:
        """Raises CheckpointError for an array of a tensor that is not `expected`."""
        for name in self._stores:
            if name not in expected and name.rpartition("/")[0] not in expected:
                raise CheckpointError(
                    f"{self.folder}: tensor {name} is no parameter of this model."
                )

    def read(self, name: str, part: Part) -> np.ndarray:
        """Part of an array."""
        store = self._stores[name]
        if self._dtype(name) != INT4:
            return self._wait(name, store[part].read())
        *others, last = part
        pairs = slice(last.start // 2, -(-last.stop // 2))
        values = unpack(self._wait(name, store[(*others, pairs)].read()))
        first = last.start % 2
        return values[..., first : first + last.stop - last.start]

    def layout(self, name: str) -> StorageLayout:
        """The layout of an array, in the chunks that are read."""
        store, dtype = self._stores[name], self._dtype(name)
        chunk = _unpacked(store.chunk_layout.read_chunk.shape, dtype)
        return StorageLayout(tuple(range(store.rank)), dtype.itemsize, chunk=chunk)

    def _dtype(self, name: str) -> np.dtype:
        dtype = np.dtype(self._stores[name].dtype.numpy_dtype)
        return INT4 if dtype == np.uint8 else dtype

    def _shape(self, name: str) -> tuple[int, ...]:
        return _unpacked(self._stores[name].shape, self._dtype(name))

    def _store(self, name: str) -> Any:
        if name not in self._stores:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing.")
        return self._stores[name]

    def _check(self, name: str, shape: tuple[int, ...], dtypes: tuple[np.dtype, ...]) -> np.dtype:
        self._store(name)
        dtype, stored = self._dtype(name), self._shape(name)
        if stored != shape:
            raise CheckpointError(
                f"{self.folder}: tensor {name} is {stored} there and {shape} in the model of "
                "this config."
            )
        if dtype not in dtypes:
            raise CheckpointError(
                f"{self.folder}: tensor {name} is {dtype} there; {' or '.join(map(str, dtypes))} "
                "would be right."
            )
        return dtype

    def _wait(self, name: str, future: Any) -> Any:
        try:
            return wait(future)
        except DamagedArrayError as error:
            message = f"{self.folder}: tensor {name} is not as it was saved: {error}."
            raise DamageError(message) from error
        except OSError as error:
            message = f"{self.folder}: tensor {name} cannot be read: {error}."
            raise CheckpointError(message) from error


def _unpacked(shape: Any, dtype: np.dtype) -> Any:
    """The shape of values of which the stored array, or a chunk of it, has this one; a scalar has
    no chunks, None."""
    return (*shape[:-1], 2 * shape[-1]) if dtype == INT4 else shape
