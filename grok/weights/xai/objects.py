"""The objects that a `ckpt-0` file may hold, as symbols; no global that it names is ever called.
States are those of NumPy's `ndarray.__reduce__` and `dtype.__reduce__`, and of the release's class.
"""

import dataclasses
import enum
import math

import ml_dtypes
import numpy as np

MAX_DIMENSIONS = 3


class MalformedError(Exception):
    """A flaw of a file; becomes a CheckpointError that also names the file and the opcode."""


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array in a file: `nbytes` bytes from `offset` on, little-endian, in C order."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """`values` (..., rows, columns); of int8, with bfloat16 `scales` (..., groups, columns), each
    group of which serves rows/groups consecutive rows. A plain array has no scales."""

    values: StoredArray
    scales: StoredArray | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + (self.scales.nbytes if self.scales else 0)


# NEWTRUE and NEWFALSE; Python's own True and False would pass for the numbers 1 and 0.
PickleBool = enum.Enum("PickleBool", "TRUE FALSE")
# The globals that a file may name.
Global = enum.Enum("Global", "RECONSTRUCT NDARRAY DTYPE BFLOAT16 QUANTIZED")
GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"): Global.RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): Global.RECONSTRUCT,  # its name since NumPy 2
    ("numpy", "ndarray"): Global.NDARRAY,
    ("numpy", "dtype"): Global.DTYPE,
    ("ml_dtypes", "bfloat16"): Global.BFLOAT16,
    ("__main__", "QuantizedWeight8bit"): Global.QUANTIZED,
}
# NPY_NEEDS_PYAPI, NPY_USE_GETITEM and NPY_USE_SETITEM, of which versions of ml_dtypes set some.
BFLOAT16_FLAGS = 0x70
FLOAT32, INT8, BFLOAT16 = np.dtype("<f4"), np.dtype("i1"), np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class FileBytes:
    """A bytes object left in the file; `tag` has its content if that is a single byte."""

    offset: int
    nbytes: int
    tag: bytes


@dataclasses.dataclass(eq=False)
class DtypeObject:
    """A dtype that REDUCE made; one BUILD makes it ready."""

    dtype: np.dtype
    ready: bool = False


@dataclasses.dataclass(eq=False)
class TensorObject:
    """An array that REDUCE made, or a QuantizedWeight8bit that NEWOBJ made; one BUILD says where
    its bytes lie."""

    quantized: bool
    stored: StoredTensor | None = None


def find_global(module: object, name: object) -> Global:
    """The symbol of STACK_GLOBAL."""
    if not (isinstance(module, str) and isinstance(name, str)):
        raise MalformedError("names a global by something other than text")
    symbol = GLOBALS.get((module, name))
    if symbol is None:
        raise MalformedError(
            f"names the global {_shown(f'{module}.{name}')}; only NumPy arrays of float32, int8 "
            "and bfloat16, and QuantizedWeight8bit, belong in a release"
        )
    return symbol


def new_object(opcode: str, function: object, arguments: object) -> DtypeObject | TensorObject:
    """The incomplete object that REDUCE or NEWOBJ makes."""
    match opcode, function, arguments:
        case "REDUCE", Global.RECONSTRUCT, (Global.NDARRAY, (0,), FileBytes(tag=b"b")):
            return TensorObject(quantized=False)
        case "REDUCE", Global.DTYPE, ("f4", PickleBool.FALSE, PickleBool.TRUE):
            return DtypeObject(FLOAT32)
        case "REDUCE", Global.DTYPE, ("i1", PickleBool.FALSE, PickleBool.TRUE):
            return DtypeObject(INT8)
        case "REDUCE", Global.DTYPE, (Global.BFLOAT16, PickleBool.FALSE, PickleBool.TRUE):
            return DtypeObject(BFLOAT16)
        case "REDUCE", Global.DTYPE, (str() as code, *_):
            right = "float32, int8 or bfloat16 is right"
            raise MalformedError(f"has an array of dtype {_shown(code)}; {right}")
        case "NEWOBJ", Global.QUANTIZED, ():
            return TensorObject(quantized=True)
    raise MalformedError(f"calls by {opcode} what no array and no QuantizedWeight8bit needs")


def set_items(target: object, items: list[object]) -> None:
    """SETITEMS: put the arrays `weight` and `scales` into a dict."""
    if not isinstance(target, dict) or len(items) % 2:
        raise MalformedError("sets items of something other than a dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if key not in ("weight", "scales") or key in target:
            raise MalformedError(
                "has a QuantizedWeight8bit with other keys than weight and scales, each once"
            )
        match value:
            case TensorObject(quantized=False, stored=StoredTensor(values=array)):
                target[key] = array
            case _:
                raise MalformedError(f"has a QuantizedWeight8bit in which {key} is not an array")


def set_state(target: object, state: object) -> None:
    """BUILD: complete `target` with `state`."""
    match target, state:
        case DtypeObject(ready=False), tuple():
            _check_dtype_state(target.dtype, state)
            target.ready = True
        case (
            TensorObject(quantized=False, stored=None),
            (1, tuple() as shape, DtypeObject(ready=True) as kind, PickleBool() as order, data),
        ) if isinstance(data, FileBytes):
            if order is PickleBool.TRUE:
                raise MalformedError("has an array in Fortran order; the release's are in C order")
            target.stored = StoredTensor(_stored_array(shape, kind.dtype, data))
        case TensorObject(quantized=True, stored=None), {"weight": weight, "scales": scales}:
            target.stored = _stored_int8(weight, scales)
        case _:
            raise MalformedError("completes an object by another state than NumPy's or a release's")


def _check_dtype_state(dtype: np.dtype, state: tuple[object, ...]) -> None:
    match state:
        case (3, ">", *_):
            raise MalformedError(
                f"has a big-endian array of {dtype}; a release's are little-endian"
            )
        case (3, "<", None, None, None, -1, -1, 0) if dtype == FLOAT32:
            return
        case (3, "|", None, None, None, -1, -1, 0) if dtype == INT8:
            return
        case (3, "<", None, None, None, 2, 2, int() as flags) if dtype == BFLOAT16:
            if not flags & ~BFLOAT16_FLAGS:
                return
    raise MalformedError(f"has a dtype {dtype} with fields or a layout of its own; plain is right")


def _stored_array(shape: tuple[object, ...], dtype: np.dtype, data: FileBytes) -> StoredArray:
    dims = tuple(dim for dim in shape if isinstance(dim, int) and dim > 0)
    if len(dims) != len(shape) or not 1 <= len(dims) <= MAX_DIMENSIONS:
        raise MalformedError(f"has an array not of 1 to {MAX_DIMENSIONS} positive dimensions")
    needed = math.prod(dims) * dtype.itemsize
    if needed != data.nbytes:
        raise MalformedError(
            f"has an array of shape {dims} and dtype {dtype}, which takes {needed:,} bytes, and "
            f"{data.nbytes:,} are there"
        )
    return StoredArray(dims, dtype, data.offset, data.nbytes)


def _stored_int8(weight: StoredArray, scales: StoredArray) -> StoredTensor:
    if weight.dtype != INT8 or scales.dtype != BFLOAT16:
        raise MalformedError(
            f"has {weight.dtype} weight and {scales.dtype} scales; int8 and bfloat16 are right"
        )
    fits = (
        len(weight.shape) == len(scales.shape) >= 2
        and weight.shape[:-2] == scales.shape[:-2]
        and weight.shape[-2] % scales.shape[-2] == 0
        and weight.shape[-1] == scales.shape[-1]
    )
    if not fits:
        raise MalformedError(
            f"has scales {scales.shape} for a weight {weight.shape}; only the last dimension but "
            "one may differ, and has to divide the weight's"
        )
    return StoredTensor(weight, scales)


def _shown(text: str) -> str:
    """Text from a file, quoted, shortened, and with control characters escaped."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
