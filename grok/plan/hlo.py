"""A parser of what costs need of the text of compiled XLA programs: types, dimensions and memory of
results, operands, and attributes as text."""

import dataclasses
import math
import re

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4,
    "s64": 8, "u64": 8, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "f8e4m3fn": 1,
    "f8e5m2": 1,
}  # fmt: skip

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all",
)  # fmt: skip

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_END = re.compile(r"^\}(, |$)")  # a kernel's metadata may have lines that begin with a bracket
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z\-]*)\(")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of the program: type, dimensions, and the memory that it lies in."""

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

    @property
    def op_name(self) -> str:
        """The path of the JAX operation that it comes from, or else its own name."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else self.name

    def called(self, key: str) -> list[str]:
        """Computations that an attribute names."""
        match = re.search(rf"\b{key}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.attributes)
        names = (match[1] or match[2]).split(",") if match else []
        return [name.strip().lstrip("%") for name in names]


Computation = dict[str, Instruction]


def parse_hlo(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a program by name, and the name of the one that it enters."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if match := _COMPUTATION.match(line):
                current = computations.setdefault(match[2], {})
                entry = match[2] if match[1] else entry
        elif _END.match(line):
            current = None
        elif match := _INSTRUCTION.match(line):
            current[match[2]] = _instruction(match[2], match[3], bool(match[1]))
    return computations, entry


def roots_of(computation: Computation) -> list[Instruction]:
    """The instructions that make a computation's results, one for each: the root, as often as it
    has results, or operands of a root tuple."""
    (root,) = (instruction for instruction in computation.values() if instruction.is_root)
    if root.opcode == "tuple":
        return [computation[name] for name in root.operands]
    return [root] * max(1, len(root.arrays))


def inline_fusions(computations: dict[str, Computation], name: str) -> Computation:
    """A computation with the fusions inside it replaced by what they fuse."""
    result: Computation = {}
    for outer in computations[name].values():
        if outer.opcode != "fusion":
            result[outer.name] = outer
            continue
        fused = inline_fusions(computations, outer.called("calls")[0])
        for inner in fused.values():
            operands = tuple(f"{outer.name}/{o}" if o in fused else o for o in inner.operands)
            new = dataclasses.replace(
                inner, name=f"{outer.name}/{inner.name}", operands=operands, is_root=False
            )
            if inner.opcode == "parameter":
                argument = outer.operands[int(inner.operands[0])]
                new = dataclasses.replace(new, opcode="bitcast", operands=(argument,))
            result[new.name] = new
            if inner.is_root:
                is_tuple = inner.opcode == "tuple"
                opcode, names = ("tuple", operands) if is_tuple else ("bitcast", (new.name,))
                result[outer.name] = dataclasses.replace(outer, opcode=opcode, operands=names)
    return result


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    opcode = _OPCODE.search(rest)
    assert opcode, rest
    end = _closing(rest, opcode.end() - 1)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[opcode.end() : end]))
    if opcode[1] in ("constant", "parameter"):
        operands = (rest[opcode.end() : end],)
    arrays = _arrays(rest[: opcode.start() + 1])
    return Instruction(name, opcode[1], arrays, operands, rest[end + 1 :], is_root)


def _closing(text: str, start: int) -> int:
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    return len(text)


def _arrays(text: str) -> tuple[Array, ...]:
    arrays = []
    for dtype, dims, layout in _ARRAY.findall(text):
        shape = tuple(int(n) for n in dims.split(",") if n)
        # Memory space 0, the default, is HBM, 1 VMEM, 5 the host's, others of flags and scalars.
        arrays.append(Array(dtype, shape, not re.search(r"S\([1-9]", layout), "S(5)" in layout))
    return tuple(arrays)
