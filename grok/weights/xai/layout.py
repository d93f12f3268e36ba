"""What surrounds the arrays in a `ckpt-0` file: the opcodes that Python's pickler would write.

A file is a pickle (protocol 4) of a NumPy array or of a `__main__.QuantizedWeight8bit`, so its
opcodes are the same for every tensor, but for shapes and lengths. The opcodes are documented in
CPython's Lib/pickletools.py, the frames in PEP 3154.
"""

import dataclasses
import math
import struct

# What a file is made of, in order: opcodes, or the number of bytes of an array in their place.
Layout = list[bytes | int]

PROTO, FRAME, STOP, MARK, MEMOIZE, BINGET = b"\x80\x04", b"\x95", b".", b"(", b"\x94", b"h"
NONE, TRUE, FALSE, EMPTY_TUPLE, EMPTY_DICT, SETITEMS = b"N", b"\x88", b"\x89", b")", b"}", b"u"
STACK_GLOBAL, REDUCE, NEWOBJ, BUILD = b"\x93", b"R", b"\x81", b"b"
SHORT_BINUNICODE, SHORT_BINBYTES, BINBYTES, BINBYTES8 = b"\x8c", b"C", b"B", b"\x8e"
BININT1, BININT2, BININT = b"K", b"M", b"J"
TUPLE, TUPLES = b"t", {1: b"\x85", 2: b"\x86", 3: b"\x87"}
# A full frame ends before the next object; bytes of this length are left outside frames.
FULL_FRAME = 1 << 16
# Less is written without a frame around it.
SMALLEST_FRAME = 4


def plain_layout(shape: tuple[int, ...]) -> Layout:
    """The file of a float32 array of one to three dimensions."""
    pickle = _Pickle()
    pickle.array(shape, FLOAT32)
    return pickle.finish()


def quantized_layout(weight: tuple[int, ...], scales: tuple[int, ...]) -> Layout:
    """The file of int8 weights and bfloat16 scales of these shapes."""
    pickle = _Pickle()
    pickle.name("__main__", "QuantizedWeight8bit")
    pickle.begin(EMPTY_TUPLE)
    pickle.end(NEWOBJ, memo="")
    pickle.begin(EMPTY_DICT, memo="")
    pickle.end(MARK)
    pickle.text("weight")
    pickle.array(weight, INT8)
    pickle.text("scales")
    pickle.array(scales, BFLOAT16)
    pickle.end(SETITEMS + BUILD)
    return pickle.finish()


@dataclasses.dataclass(frozen=True)
class _Dtype:
    """A type as NumPy reduces it: its class or its code, and its state's parts that differ."""

    module: str | None
    name: str
    itemsize: int
    order: str
    numbers: tuple[int, int, int]


FLOAT32 = _Dtype(None, "f4", 4, "<", (-1, -1, 0))
INT8 = _Dtype(None, "i1", 1, "|", (-1, -1, 0))
BFLOAT16 = _Dtype("ml_dtypes", "bfloat16", 2, "<", (2, 2, 64))


class _Pickle:
    """Opcodes as the pickler writes them: with its memo, and cut into frames where it cuts."""

    def __init__(self) -> None:
        self.layout: Layout = [PROTO]
        self.frame: Layout = []
        # What each entry of the memo is called here, "" for what is not asked for again.
        self.memo: list[str] = []

    def begin(self, opcodes: bytes, memo: str | None = None) -> None:
        """The first opcodes of an object, before which a full frame ends."""
        if _length(self.frame) >= FULL_FRAME:
            self.end_frame()
        self.end(opcodes, memo)

    def end(self, opcodes: bytes, memo: str | None = None) -> None:
        """Further opcodes of an object; with `memo`, it is put into the memo by that name."""
        self.frame.append(opcodes)
        if memo is not None:
            self.frame.append(MEMOIZE)
            self.memo.append(memo)

    def end_frame(self) -> None:
        length = _length(self.frame)
        if length >= SMALLEST_FRAME:
            self.layout.append(FRAME + struct.pack("<Q", length))
        self.layout += self.frame
        self.frame = []

    def finish(self) -> Layout:
        self.end(STOP)
        self.end_frame()
        return self.layout

    # Objects

    def recall(self, memo: str) -> bool:
        """Refer to an object that the memo has; False where it has none."""
        if memo not in self.memo:
            return False
        self.begin(BINGET + bytes([self.memo.index(memo)]))
        return True

    def text(self, value: str) -> None:
        if not self.recall(value):
            self.begin(SHORT_BINUNICODE + bytes([len(value)]) + value.encode(), memo=value)

    def name(self, module: str, name: str) -> None:
        """A global."""
        if not self.recall(f"{module}.{name}"):
            self.text(module)
            self.text(name)
            self.end(STACK_GLOBAL, memo=f"{module}.{name}")

    def integer(self, value: int) -> None:
        if 0 <= value < 1 << 8:
            self.begin(BININT1 + struct.pack("<B", value))
        elif 0 <= value < 1 << 16:
            self.begin(BININT2 + struct.pack("<H", value))
        else:
            self.begin(BININT + struct.pack("<i", value))

    def array(self, shape: tuple[int, ...], dtype: _Dtype) -> None:
        """What `ndarray.__reduce__` gives: an empty array, and the state that fills it."""
        self.name("numpy.core.multiarray", "_reconstruct")
        self.name("numpy", "ndarray")
        self.integer(0)
        self.end(TUPLES[1], memo="")
        if not self.recall("code of an empty array"):
            self.begin(SHORT_BINBYTES + b"\x01b", memo="code of an empty array")
        self.end(TUPLES[3], memo="")
        self.end(REDUCE, memo="")
        self.begin(MARK)
        self.integer(1)
        for size in shape:
            self.integer(size)
        self.end(TUPLES[len(shape)], memo="")
        self.dtype(dtype)
        self.begin(FALSE)  # C order
        self.data(math.prod(shape) * dtype.itemsize)
        self.end(TUPLE, memo="")
        self.end(BUILD)

    def dtype(self, dtype: _Dtype) -> None:
        """What `dtype.__reduce__` gives."""
        self.name("numpy", "dtype")
        if dtype.module is None:
            self.text(dtype.name)
        else:
            self.name(dtype.module, dtype.name)
        self.begin(FALSE)
        self.begin(TRUE)
        self.end(TUPLES[3], memo="")
        self.end(REDUCE, memo="")
        self.begin(MARK)
        self.integer(3)
        self.text(dtype.order)
        for _ in range(3):
            self.begin(NONE)
        for number in dtype.numbers:
            self.integer(number)
        self.end(TUPLE, memo="")
        self.end(BUILD)

    def data(self, nbytes: int) -> None:
        """A bytes object, whose place in the layout is its length."""
        if nbytes < 1 << 8:
            self.begin(SHORT_BINBYTES + struct.pack("<B", nbytes))
        elif nbytes < 1 << 32:
            self.begin(BINBYTES + struct.pack("<I", nbytes))
        else:
            self.begin(BINBYTES8 + struct.pack("<Q", nbytes))
        if nbytes < FULL_FRAME:
            self.frame.append(nbytes)
        else:
            head = self.frame.pop()
            self.end_frame()
            self.layout += [head, nbytes]
        self.end(b"", memo="")


def _length(layout: Layout) -> int:
    return sum(part if isinstance(part, int) else len(part) for part in layout)
