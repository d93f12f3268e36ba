"""The text of a compiled XLA program, read into computations and instructions.

Only what costs are counted from is kept: types, dimensions and memory of results, operands, and
attributes as text.
"""

import dataclasses
import math
import re

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4,
    "s64": 8, "u64": 8, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "f8e4m3fn": 1,
    "f8e5m2": 1,
}  # fmt: skip

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_END = re.compile(r"^\}(, |$)")  # a kernel's metadata may have lines that begin with a bracket
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z\-]*)\(")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in the program: type, dimensions, and whether it lies in HBM, or with the host."""

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool
    on_host: bool

    @property
    def size(self) -> float:
        """Bytes, without padding."""
        return math.prod(self.shape) * BYTES.get(self.dtype, 4)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # the result: one, or those of a tuple in order
    operands: tuple[str, ...]
    attributes: str  # what follows the operands
    is_root: bool

    def called(self, key: str) -> list[str]:
        """Computations that an attribute names."""
        found = re.search(rf"\b{key}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.attributes)
        if not found:
            return []
        return [name.strip().lstrip("%") for name in (found[1] or found[2]).split(",")]


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a program by name, and the name of the one that it enters."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            found = _COMPUTATION.match(line)
            if found:
                current = computations.setdefault(found[2], {})
                entry = found[2] if found[1] else entry
        elif _END.match(line):
            current = None
        else:
            found = _INSTRUCTION.match(line)
            if found:
                current[found[2]] = _instruction(found[2], found[3], bool(found[1]))
    return computations, entry


def inlined(computations: dict[str, Computation], name: str) -> Computation:
    """A computation with the fusions inside it replaced by what they fuse."""
    result: Computation = {}
    for one in computations[name].values():
        if one.opcode != "fusion":
            result[one.name] = one
            continue
        inner = inlined(computations, one.called("calls")[0])
        for each in inner.values():
            operands = tuple(f"{one.name}/{o}" if o in inner else o for o in each.operands)
            new = dataclasses.replace(
                each, name=f"{one.name}/{each.name}", operands=operands, is_root=False
            )
            if each.opcode == "parameter":
                given = one.operands[int(each.operands[0])]
                new = dataclasses.replace(new, opcode="bitcast", operands=(given,))
            result[new.name] = new
            if each.is_root:
                several = each.opcode == "tuple"
                result[one.name] = dataclasses.replace(
                    one,
                    opcode="tuple" if several else "bitcast",
                    operands=operands if several else (new.name,),
                )
    return result


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    opcode = _OPCODE.search(rest)
    assert opcode, rest
    end = _closing(rest, opcode.end() - 1)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[opcode.end() : end]))
    if opcode[1] in ("constant", "parameter"):
        operands = (rest[opcode.end() : end],)
    return Instruction(
        name, opcode[1], _arrays(rest[: opcode.start() + 1]), operands, rest[end + 1 :], is_root
    )


def _closing(text: str, start: int) -> int:
    """Place of the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    return len(text)


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(
            dtype,
            tuple(int(n) for n in dims.split(",") if n),
            # Memory space 0, the default, is HBM, 1 is VMEM, 5 is the host's; flags and scalars
            # lie elsewhere.
            not re.search(r"S\([1-9]", layout),
            "S(5)" in layout,
        )
        for dtype, dims, layout in _ARRAY.findall(text)
    )
