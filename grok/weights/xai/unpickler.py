"""Finds where the arrays of a `ckpt-0` file lie: a pickle (protocol 4) that is never unpickled.
Only opcodes of a NumPy array or a QuantizedWeight8bit are known; array bytes are skipped. Opcodes
are documented in CPython's Lib/pickletools.py, frames in PEP 3154."""

import os
import pickletools
from typing import BinaryIO

from grok import storage
from grok.errors import CheckpointError
from grok.weights.xai.objects import (
    FileBytes,
    MalformedError,
    PickleBool,
    StoredTensor,
    TensorObject,
    find_global,
    new_object,
    set_items,
    set_state,
)

# A release's have up to about 135; this bounds the stack and memo of hostile ones.
MAX_OPCODES = 512
PROTOCOL_4 = b"\x80\x04"
OPCODE_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
TRUE, FALSE = PickleBool.TRUE, PickleBool.FALSE
CONSTANTS = {"NONE": None, "NEWTRUE": TRUE, "NEWFALSE": FALSE, "EMPTY_TUPLE": ()}
# Width of the length in front of a bytes object.
LENGTH_BYTES = {"SHORT_BINBYTES": 1, "BINBYTES": 4, "BINBYTES8": 8}
# Contents of files after downloads that went wrong, by their first bytes.
FOREIGN = {
    b"version https://git-lfs": (
        "is a git-lfs pointer, which stands for a file that was not downloaded; `git lfs pull` "
        "downloads it"
    ),
    b"<": "is HTML or XML, as a server sends in place of a file that it does not give",
    b"{": "is JSON, as a server sends in place of a file that it does not give",
    b"d8:announce": "is a torrent, which says where to download files and holds none",
    b"\x1f\x8b": "is compressed by gzip, and has to be unpacked first",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd, and has to be unpacked first",
    b"PK\x03\x04": "is a zip archive (as PyTorch writes, too), and should be a pickled array",
    b"\x93NUMPY": "is an .npy file, and should be a pickled array",
    bytes(16): "begins with zeros, as a file does whose download has not come to its beginning",
}


def read_tensor(path: str | os.PathLike[str]) -> StoredTensor:
    """The arrays of the file at `path`. Raises CheckpointError with the file and what is wrong."""
    with storage.open_file(path, CheckpointError, storage.HEADER_BLOCK) as file:
        return parse_tensor(file, os.fspath(path))


def parse_tensor(file: BinaryIO, name: str) -> StoredTensor:
    """The arrays of an open file or mmap, called `name` in messages. Raises CheckpointError for all
    other bytes, and nothing else but OSErrors of `file`."""
    head = file.read(32)
    if not head.startswith(PROTOCOL_4):
        raise CheckpointError(f"{name}: {_what_else(head)}.")
    machine = _PickleMachine(file)
    try:
        return machine.run()
    except MalformedError as error:
        raise CheckpointError(f"{name}: {error} (opcode at byte {machine.opcode_at}).") from None


def _what_else(head: bytes) -> str:
    if not head:
        return "is empty"
    for start, description in FOREIGN.items():
        if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(start):
            return description
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\5"):
        return f"is a pickle of protocol {head[1]}; the release's are of protocol 4"
    return "does not begin as a pickle of protocol 4, which the release's files are"


class _PickleMachine:
    """A pickle machine over symbols: a stack, marks into it, a memo, and the current frame."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        file.seek(0, os.SEEK_END)
        self.size = file.tell()
        self.position = self.opcode_at = len(PROTOCOL_4)
        file.seek(self.position)
        self.frame_end: int | None = None
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: list[object] = []

    def run(self) -> StoredTensor:
        for _ in range(MAX_OPCODES):
            self.opcode_at = self.position
            if self.frame_end == self.position:
                self.frame_end = None
            code = self.number(1)
            opcode = OPCODE_NAMES.get(code)
            if opcode is None:
                raise MalformedError(f"has the byte 0x{code:02x}, which is no opcode, for one")
            if opcode == "STOP":
                return self.finish()
            self.execute(opcode)
        raise MalformedError(f"has more than {MAX_OPCODES} opcodes")

    def execute(self, opcode: str) -> None:
        match opcode:
            case "FRAME":
                self.begin_frame(self.number(8))
            case "MARK":
                self.marks.append(len(self.stack))
            case "MEMOIZE":
                self.stack.append(self.pop())
                self.memo.append(self.stack[-1])
            case "BINGET":
                self.stack.append(self.recall(self.number(1)))
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                self.stack.append(CONSTANTS[opcode])
            case "BININT1" | "BININT2":
                self.stack.append(self.number(int(opcode[-1])))
            case "BININT":
                self.stack.append(int.from_bytes(self.take(4), "little", signed=True))
            case "SHORT_BINUNICODE":
                self.stack.append(self.text(self.number(1)))
            case "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8":
                self.stack.append(self.skip_bytes(self.number(LENGTH_BYTES[opcode])))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [self.pop() for _ in range(int(opcode[-1]))]
                self.push_tuple(items[::-1])
            case "TUPLE":
                self.push_tuple(self.pop_to_mark())
            case "EMPTY_DICT":
                self.stack.append({})
            case "SETITEMS":
                items, target = self.pop_to_mark(), self.pop()
                set_items(target, items)
                self.stack.append(target)
            case "STACK_GLOBAL":
                name, module = self.pop(), self.pop()
                self.stack.append(find_global(module, name))
            case "REDUCE" | "NEWOBJ":
                arguments, function = self.pop(), self.pop()
                self.stack.append(new_object(opcode, function, arguments))
            case "BUILD":
                state, target = self.pop(), self.pop()
                set_state(target, state)
                self.stack.append(target)
            case _:
                raise MalformedError(f"has the opcode {opcode}, which no release file needs")

    def finish(self) -> StoredTensor:
        """Checks that the stream ends where it should; returns the one object that it leaves."""
        if self.position != self.size:
            left = self.size - self.position
            raise MalformedError(f"has {left:,} byte{'s'[: left - 1]} after the end of its pickle")
        if len(self.stack) != 1 or self.marks:
            raise MalformedError("does not end with exactly one object")
        match self.stack[0]:
            case TensorObject(stored=StoredTensor() as tensor):
                return tensor
        raise MalformedError("holds no complete NumPy array and no complete QuantizedWeight8bit")

    # Bytes of the file

    def reserve(self, count: int) -> None:
        """Raises unless `count` more bytes lie in the file and in the current frame."""
        left = self.size - self.position
        if count > left:
            raise MalformedError(f"is cut short: {count:,} bytes should follow, and {left:,} do")
        if self.frame_end is not None and count > self.frame_end - self.position:
            raise MalformedError("has an opcode that reaches over the end of its frame")

    def take(self, count: int) -> bytes:
        self.reserve(count)
        data = self.file.read(count)
        if len(data) != count:
            raise MalformedError("became shorter while it was read")
        self.position += count
        return data

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def text(self, length: int) -> str:
        data = self.take(length)
        if not data.isascii():
            raise MalformedError(f"has a text of {length} bytes that is not ASCII")
        return data.decode("ascii")

    def skip_bytes(self, length: int) -> FileBytes:
        """A bytes object, left in the file; only a single byte (a type code) is read."""
        offset = self.position
        if length == 1:
            return FileBytes(offset, length, self.take(1))
        self.reserve(length)
        self.position += length
        self.file.seek(self.position)
        return FileBytes(offset, length, b"")

    def begin_frame(self, length: int) -> None:
        if self.frame_end is not None:
            raise MalformedError("begins a frame inside another")
        self.reserve(length)
        self.frame_end = self.position + length

    # Stack and memo

    def push_tuple(self, items: list[object]) -> None:
        # No state is nested deeper, and comparisons of tuples recur.
        if any(isinstance(item, tuple) and tuple in map(type, item) for item in items):
            raise MalformedError("nests tuples more than two deep")
        self.stack.append(tuple(items))

    def pop(self) -> object:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise MalformedError("takes an object from an empty stack")
        return self.stack.pop()

    def pop_to_mark(self) -> list[object]:
        if not self.marks:
            raise MalformedError("takes objects up to a mark that is not there")
        mark = self.marks.pop()
        items, self.stack = self.stack[mark:], self.stack[:mark]
        return items

    def recall(self, index: int) -> object:
        if index >= len(self.memo):
            raise MalformedError(f"refers to memo {index}, and has {len(self.memo)}")
        return self.memo[index]
