"""Feeds damaged and hostile release files to the parser, and counts the outcomes.

    python -m benchmarks.fuzz_release --cases 1000000 --seed 0

Cases are valid files with changed bits, bytes, lengths or opcodes, spliced with each other or with
calls of other globals, and random programs of opcodes. The parser must accept each one or refuse
it with a CheckpointError. Python then unpickles accepted ones too (with the release's globals
alone), and they must hold the same arrays. While a case is parsed, an audit hook counts every
event that Python reports: imports, opened files, compiled or executed code, started processes.

A million cases take several minutes of one CPU core. Exits with 1 on any other outcome or any
event.
"""

import argparse
import collections
import dataclasses
import io
import pickle
import pickletools
import random
import re
import struct
import sys
import time
from collections.abc import Callable

import ml_dtypes
import numpy as np

from grok.errors import CheckpointError
from grok.weights.xai.objects import GLOBALS, StoredTensor
from grok.weights.xai.unpickler import parse_tensor
from tests.fixtures.release_layout import Layout, plain_layout, quantized_layout

HEAD = b"\x80\x04"
EXTREMES = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63, 2**64 - 1)


@dataclasses.dataclass
class Counts:
    """Counts of the outcomes; `refused` is by reason, `unhandled` and `events` should be empty."""

    cases: int = 0
    accepted: int = 0
    refused: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    unhandled: list[str] = dataclasses.field(default_factory=list)
    events: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    slowest: float = 0.0


# Valid files


def filled(layout: Layout, rng: random.Random) -> bytes:
    """A file of this layout with random arrays."""
    return b"".join(item if isinstance(item, bytes) else rng.randbytes(item) for item in layout)


def valid_files(rng: random.Random) -> list[bytes]:
    """One of each kind: dimensions, groups, widths of integers, lengths of arrays, both NumPys."""
    files = [filled(plain_layout(shape), rng) for shape in ((3,), (64,), (300,), (6, 8), (2, 3, 5))]
    for weight, scales in (
        ((6, 8), (1, 8)),
        ((64, 16), (8, 16)),
        ((2, 12, 5), (2, 1, 5)),
        ((2, 300, 1), (2, 4, 1)),
    ):
        files.append(filled(quantized_layout(weight, scales), rng))
    files.append(pickle.dumps(np.arange(12, dtype=np.float32), protocol=4))
    files.append(pickle.dumps(np.arange(12).astype(ml_dtypes.bfloat16), protocol=4))
    return files


# Mutations


@dataclasses.dataclass(frozen=True)
class Seed:
    """A valid file, where its opcodes begin, and where it has other bytes than arrays'."""

    data: bytes
    starts: list[int]
    header: list[int]

    @classmethod
    def of(cls, data: bytes) -> "Seed":
        """Of a valid file. Its PROTO and FRAME do not count as opcodes here."""
        starts: list[int] = []
        header: list[int] = []
        end = len(data)
        for opcode, value, start in reversed(list(pickletools.genops(data))):
            assert start is not None
            array = len(value) if value is not None and "BINBYTES" in opcode.name else 0
            header += range(start, end - array)
            starts.append(start)
            end = start
        return cls(data, starts[-3::-1], header)


def text(value: str) -> bytes:
    """The opcode of a short text."""
    return b"\x8c" + bytes([len(value)]) + value.encode()


def name(module: str, attribute: str) -> bytes:
    """The opcodes of a global."""
    return text(module) + text(attribute) + b"\x93"


CALLS = (
    name("os", "system") + text("touch /tmp/fuzzed") + b"\x85R",
    name("builtins", "eval") + text("1/0") + b"\x85R",
    name("builtins", "exec") + text("raise SystemExit") + b"\x85R",
    name("subprocess", "Popen") + text("true") + b"\x85R",
    name("numpy", "fromfile") + text("/etc/hostname") + b"\x85R",
    name("numpy", "ndarray") + b"K\x05\x85R",
    name("numpy", "dtype") + text("O8") + b"\x89\x88\x87R",
    name("numpy._core.multiarray", "_reconstruct") + b"N\x85R",
    name("__main__", "QuantizedWeight8bit") + b")\x81}b",
    name("__main__", "QuantizedWeight8bit") + b")R",
    name("os", "system") + b"}" + text("__setstate__") + b"Nsb",
    b"cos\nsystem\n(" + text("true") + b"tR",
    b"(" + text("true") + b"ios\nsystem\n",
    b"(" + name("os", "system") + text("true") + b"o",
    b"\x82\x01R",
    b"Pname\n",
    b"Q",
    b"\x8a\xff" + b"\xff" * 255,
    b"\x97\x98",
)
WORDS = (
    *(
        bytes([code])
        for code in b"(.0N12)}]\x88\x89\x85\x86\x87\x94\x93\x81Rbutsael\x8f\x90\x91\x92"
    ),
    *(b"h" + bytes([index]) for index in range(20)),
    *(b"K" + bytes([number]) for number in (0, 1, 2, 3, 8, 255)),
    *(
        b"M\x00\x10",
        b"J\xff\xff\xff\xff",
        b"C\x01b",
        b"C\x08" + bytes(8),
        b"B\x04\0\0\0" + bytes(4),
    ),
    *(text(word) for word in ("f4", "i1", "<", "|", ">", "weight", "scales", "numpy", "__main__")),
    *(name(module, attribute) for module, attribute in GLOBALS),
    *CALLS,
)


def framed(data: bytes) -> bytes:
    """`data` with the length of its first frame put right, as far as that is one frame."""
    if data[2:3] != b"\x95" or len(data) < 11:
        return data
    return data[:3] + struct.pack("<Q", len(data) - 11) + data[11:]


def flip_bits(rng: random.Random, seed: Seed, seeds: list[Seed]) -> bytes:
    """One to three bits changed."""
    data = bytearray(seed.data)
    for _ in range(rng.randint(1, 3)):
        data[rng.choice(seed.header)] ^= 1 << rng.randrange(8)
    return bytes(data)


def change_bytes(rng: random.Random, seed: Seed, seeds: list[Seed]) -> bytes:
    """One to four bytes replaced."""
    data = bytearray(seed.data)
    for _ in range(rng.randint(1, 4)):
        data[rng.choice(seed.header)] = rng.randrange(256)
    return bytes(data)


def cut(rng: random.Random, seed: Seed, seeds: list[Seed]) -> bytes:
    """An end that is missing, or a stretch inside."""
    start = rng.randrange(len(seed.data))
    stop = len(seed.data) if rng.random() < 0.5 else start + rng.randint(1, 40)
    return seed.data[:start] + seed.data[stop:]


def append(rng: random.Random, seed: Seed, seeds: list[Seed]) -> bytes:
    """Bytes after the end."""
    return seed.data + rng.randbytes(rng.randint(1, 40))


def duplicate(rng: random.Random, seed: Seed, seeds: list[Seed]) -> bytes:
    """A range of opcodes that comes again, there or elsewhere."""
    first, last = sorted(rng.sample(seed.starts, 2))
    at = rng.choice((last, rng.choice(seed.starts)))
    return seed.data[:at] + seed.data[first:last] + seed.data[at:]


def remove(rng: random.Random, seed: Seed, seeds: list[Seed]) -> bytes:
    """One or some opcodes that are missing."""
    index = rng.randrange(len(seed.starts) - 1)
    stop = min(index + rng.choice((1, 1, 2, 5)), len(seed.starts) - 1)
    return seed.data[: seed.starts[index]] + seed.data[seed.starts[stop] :]


def splice(rng: random.Random, seed: Seed, seeds: list[Seed]) -> bytes:
    """The beginning of one file and the end of another."""
    other = rng.choice(seeds)
    return seed.data[: rng.choice(seed.starts)] + other.data[rng.choice(other.starts) :]


def insert(rng: random.Random, seed: Seed, seeds: list[Seed]) -> bytes:
    """Opcodes between others, or in the place of one."""
    index = rng.randrange(len(seed.starts) - 1)
    stop = index + rng.randint(0, 1)
    words = b"".join(rng.choices(WORDS, k=rng.randint(1, 4)))
    return seed.data[: seed.starts[index]] + words + seed.data[seed.starts[stop] :]


def call(rng: random.Random, seed: Seed, seeds: list[Seed]) -> bytes:
    """A call of something else, alone or inside a file."""
    at = rng.choice(seed.starts)
    if rng.random() < 0.2:
        return HEAD + rng.choice(CALLS) + b"."
    return seed.data[:at] + rng.choice(CALLS) + rng.choice((b"", b"0")) + seed.data[at:]


def lengths(rng: random.Random, seed: Seed, seeds: list[Seed]) -> bytes:
    """An extreme number in the place of a length, a dimension or a frame's."""
    data = bytearray(seed.data)
    width = rng.choice((1, 2, 4, 8))
    at = 3 if rng.random() < 0.1 else rng.choice(seed.header)
    value = rng.choice(EXTREMES) + rng.randint(-1, 1)
    data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(data)


def program(rng: random.Random, seed: Seed, seeds: list[Seed]) -> bytes:
    """Random opcodes, mostly those that are allowed."""
    return HEAD + b"".join(rng.choices(WORDS, k=rng.randint(1, 60))) + b"."


def repeat(rng: random.Random, seed: Seed, seeds: list[Seed]) -> bytes:
    """Some opcodes over and over: deep tuples, a growing memo, many marks."""
    words = b"".join(rng.choices(WORDS, k=rng.randint(1, 3)))
    return HEAD + b"N" + words * rng.randint(100, 2000) + b"."


MUTATIONS: tuple[Callable[[random.Random, Seed, list[Seed]], bytes], ...] = (
    *(flip_bits, flip_bits, change_bytes, cut, append, duplicate, remove, splice),
    *(insert, insert, call, lengths, lengths, program, repeat),
)


# Judging


class Control(pickle.Unpickler):
    """Python's unpickler with the release's globals and no others."""

    def find_class(self, module, attribute):
        """The global, where a release may name it."""
        if (module, attribute) not in GLOBALS:
            raise pickle.UnpicklingError(f"{module}.{attribute}")
        if module == "__main__":
            return type(attribute, (), {})
        return super().find_class(module, attribute)


def holds(data: bytes, record: StoredTensor) -> bool:
    """Returns whether Python unpickles the arrays of `record` from `data`."""
    value = Control(io.BytesIO(data)).load()
    if record.scales is None:
        pairs = [(record.values, value)]
    else:
        pairs = [(record.values, value.weight), (record.scales, value.scales)]
    return all(
        (array.shape, array.dtype) == (record.shape, record.dtype)
        and array.tobytes() == data[record.offset : record.offset + record.nbytes]
        for record, array in pairs
    )


def reason(error: CheckpointError) -> str:
    """The kind of a refusal: its sentence without the numbers and names in it."""
    sentence = str(error).removeprefix("case: ").partition(" (opcode at")[0].rstrip(".")
    return re.sub(
        r"(?<!\w)'.*'|\".*\"|0x\w\w|\([\d, ]*\)|\b[\d,]*\d\b|(?<=opcode )[A-Z]\w+", "*", sentence
    )


class Watch:
    """Counts the events that Python audits inside its `with`."""

    def __init__(self) -> None:
        self.events: collections.Counter[str] = collections.Counter()
        self.on = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, _: tuple) -> None:
        if self.on:
            self.events[event] += 1

    def __enter__(self) -> None:
        self.on = True

    def __exit__(self, *_: object) -> None:
        self.on = False


def fuzz(cases: int, seed: int) -> Counts:
    """Parse so many cases."""
    rng = random.Random(seed)
    seeds = [Seed.of(data) for data in valid_files(rng)]
    counts, watch = Counts(), Watch()
    counts.events = watch.events
    for counts.cases in range(1, cases + 1):
        mutate = rng.choice(MUTATIONS)
        data = mutate(rng, rng.choice(seeds), seeds)
        # With a wrong length of its frame, little else of a file is looked at.
        if mutate is not lengths and rng.random() < 0.8:
            data = framed(data)
        file = io.BytesIO(data)
        begin = time.perf_counter()
        try:
            with watch:
                record = parse_tensor(file, "case")
        except CheckpointError as error:
            counts.refused[reason(error)] += 1
        except Exception as error:
            counts.unhandled.append(f"{type(error).__name__}: {error}: {data!r}")
        else:
            counts.accepted += 1
            try:
                assert holds(data, record)
            except Exception as error:
                counts.unhandled.append(f"accepted, but to Python {error!r}: {data!r}")
        counts.slowest = max(counts.slowest, time.perf_counter() - begin)
    return counts


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=100_000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers")
    options = parser.parse_args()
    begin = time.perf_counter()
    counts = fuzz(options.cases, options.seed)
    print(f"{counts.cases:9,} cases in {time.perf_counter() - begin:.0f} s, seed {options.seed}")
    print(f"{counts.accepted:9,} accepted, each as Python unpickles it")
    print(f"{counts.refused.total():9,} refused")
    for sentence, count in counts.refused.most_common():
        print(f"{count:13,} {sentence}")
    print(f"{len(counts.unhandled):9,} unhandled")
    for line in counts.unhandled[:10]:
        print(f"              {line}")
    print(f"{counts.events.total():9,} imports, opened files, executed code or processes")
    for event, count in counts.events.items():
        print(f"{count:13,} {event}")
    print(f"slowest case: {1000 * counts.slowest:.1f} ms")
    return int(bool(counts.unhandled or counts.events))


if __name__ == "__main__":
    sys.exit(main())
