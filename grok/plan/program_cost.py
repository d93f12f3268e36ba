"""What a compiled TPU program does, read from its text: FLOPs, bytes of HBM, bytes of collectives.

XLA's own cost analysis counts the body of a loop once. Here every computation counts as often as it
runs: a loop whose condition compares a counter with a constant as often as that says, any other as
often as the caller says. Costs are those of one device.
"""

import dataclasses
import math
import re
from collections import defaultdict

import numpy as np

from grok.plan.collectives import COLLECTIVES, bytes_sent, cuts, replica_groups
from grok.plan.hlo import Array, Computation, Instruction, inlined, parse
from grok.plan.kernels import kernel_bytes, kernel_flops
from grok.plan.matmul_flops import flops

# Names, views and bookkeeping: nothing is read or written.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "copy-done",
    "partition-id", "replica-id", "iota", "opt-barrier", "domain", "call-done",
}  # fmt: skip


# What puts a part into an array, in place, and which operand the part is.
PUTS = {"dynamic-update-slice": 1, "scatter": 2}


# What begins to cut a part out of an array with the host, or to put one in, and where in the result
# the part is.
HOST_PARTS = {"dynamic-slice-start": -2, "dynamic-update-slice-start": 1}


# What passes each element on: inside a fusion, only those that are asked for.
SAME = ("bitcast", "convert", "copy", "reshape", "transpose")


@dataclasses.dataclass
class Cost:
    """What a program costs one device.

    flops: of matrix products; hbm: bytes read and written; host: bytes to the host's memory and
    from it; collectives: bytes that the device sends in each, by mesh axes and kind; loops: those
    whose count was taken from the caller; kernels: custom calls of known cost.
    """

    flops: float = 0.0
    hbm: float = 0.0
    host: float = 0.0
    collectives: dict[tuple[str, str], float] = dataclasses.field(
        default_factory=lambda: defaultdict(float)
    )
    loops: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    kernels: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))

    def add(self, other: "Cost", times: float = 1) -> None:
        """Adds another cost, so many times."""
        self.flops += times * other.flops
        self.hbm += times * other.hbm
        self.host += times * other.host
        for name in ("collectives", "loops", "kernels"):
            for key, value in getattr(other, name).items():
                getattr(self, name)[key] += times * value


class CompiledProgram:
    """A compiled program and its costs."""

    def __init__(
        self,
        text: str,
        mesh_axes: dict[str, int],
        loop_count: float = 1,
    ):
        """Reads `text`. `mesh_axes` are the sizes of the mesh, in order; `loop_count` is how often
        a loop runs whose count the text does not have. Conditionals take their dearest branch."""
        self._computations, self._entry = parse(text)
        self._axes = mesh_axes
        self._loop_count = loop_count
        self._costs: dict[str, Cost] = {}
        self._inlined: dict[str, Computation] = {}

    def cost(self) -> Cost:
        """Of one run of the whole program."""
        return self._of(self._entry)

    def _of(self, name: str) -> Cost:
        if name not in self._costs:
            total = Cost()
            for instruction in self._computations[name].values():
                total.add(self._instruction_cost(self._computations[name], instruction))
            self._costs[name] = total
        return self._costs[name]

    def _instruction_cost(self, inside: Computation, one: Instruction) -> Cost:
        if one.opcode in FREE or one.opcode.endswith(("-done", "-update")):
            return Cost()
        if one.opcode == "while":
            return self._loop(inside, one)
        total = Cost()
        if one.opcode == "conditional":
            branches = one.called("branch_computations") or [
                *one.called("true_computation"),
                *one.called("false_computation"),
            ]
            costs = (self._of(branch) for branch in branches)
            total.add(max(costs, key=lambda cost: (cost.flops, cost.hbm)))
            return total
        if one.opcode in ("call", "call-start", "async-start"):
            for called in one.called("to_apply") or one.called("calls"):
                total.add(self._of(called))
            return total
        total.host = _host_bytes(one)
        # Of what goes to the host's memory or comes from it, one end is in HBM.
        total.hbm = total.host or self._bytes(inside, one)
        if "_xla_megascale_transfer_type" in one.attributes:
            return self._between_slices(inside, one, total)
        going_on = False
        if one.opcode == "fusion":
            inside = self._fused(one)
            going_on = _is_part(inside) and not one.name.startswith("async-collective-start")
        for each in inside.values() if one.opcode == "fusion" else [one]:
            total.flops += flops(inside, each)
            kind = each.opcode.removesuffix("-start")
            if kind in COLLECTIVES and not going_on:
                groups = self._groups(each)
                # A TPU has a reduce-scatter as an all-reduce fused with what cuts out a part.
                if kind == "all-reduce" and cuts(inside):
                    kind = "reduce-scatter"
                sent = bytes_sent(inside, each, kind, groups.shape[1])
                total.collectives[self._across(groups), kind] += sent
        if one.opcode == "custom-call" and kernel_flops(inside, one):
            total.kernels[_op_name(one)] += 1
        return total

    def _between_slices(self, inside: Computation, one: Instruction, total: Cost) -> Cost:
        """With what a device hands its host, for the network, in a collective of all slices."""
        if one.opcode == "send":
            found = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.attributes)
            kind = found[1].lower().replace("_", "-") if found else "send"
            total.collectives["slice", kind] += bytes_sent(inside, one, kind, self._axes["slice"])
        return total

    def _loop(self, inside: Computation, one: Instruction) -> Cost:
        total = Cost()
        times: float | None = self._trips(inside, one)
        if times is None:
            times = self._loop_count
            total.loops[_op_name(one)] += 1
        total.add(self._of(one.called("body")[0]), times)
        return total

    # ---- how often a loop runs

    def _trips(self, inside: Computation, loop: Instruction) -> int | None:
        """Where the condition is `counter < constant` and the counter starts at a constant."""
        condition = self._computations[loop.called("condition")[0]]
        root = next(each for each in condition.values() if each.is_root)
        if root.opcode == "fusion":
            fused = self._computations[root.called("calls")[0]]
            outer = [condition[name] for name in root.operands]
            root = next(each for each in fused.values() if each.is_root)
            condition = {
                name: outer[int(each.operands[0])] if each.opcode == "parameter" else each
                for name, each in fused.items()
            }
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        first, limit = (self._value(condition, name, inside, loop) for name in root.operands)
        return None if first is None or limit is None else max(0, limit - first)

    def _value(
        self, condition: Computation, name: str, inside: Computation, loop: Instruction
    ) -> int | None:
        """A number of the condition, at the first time round, where it is a constant."""
        one = condition[name]
        if one.opcode == "get-tuple-element":
            place = int(re.search(r"index=(\d+)", one.attributes)[1])  # type: ignore[index]
            start = inside[loop.operands[0]]
            if start.opcode != "tuple":
                return None
            one = inside[start.operands[place]]
        while one.opcode in ("copy", "bitcast"):
            one = inside[one.operands[0]]
        if one.opcode == "constant" and re.fullmatch(r"-?\d+", one.operands[0]):
            return int(one.operands[0])
        return None

    def _fused(self, one: Instruction) -> Computation:
        (name,) = one.called("calls")
        if name not in self._inlined:
            self._inlined[name] = inlined(self._computations, name)
        return self._inlined[name]

    # ---- bytes of HBM

    def _bytes(self, inside: Computation, one: Instruction) -> float:
        """What an instruction reads from HBM and writes to it."""
        if one.opcode == "copy-start":
            source, target = one.arrays[:2]
            return source.size * source.in_hbm + target.size * target.in_hbm
        if one.opcode == "recv":
            return _hbm(one.arrays)
        operands = [inside[name] for name in one.operands if name in inside]
        if one.opcode == "send":
            return _hbm(operands[0].arrays)
        if one.opcode == "custom-call" and (known := kernel_bytes(inside, one)) is not None:
            return known
        if one.opcode == "fusion":
            return self._fusion_bytes(one, operands)
        if one.opcode == "dynamic-slice":
            return _hbm(one.arrays) + one.arrays[0].size * operands[0].arrays[0].in_hbm
        if one.opcode in PUTS:
            return 2 * inside[one.operands[PUTS[one.opcode]]].arrays[0].size * one.arrays[0].in_hbm
        if one.opcode == "gather":
            return 2 * _hbm(one.arrays)
        return _hbm(one.arrays) + sum(_hbm(each.arrays) for each in operands)

    def _fusion_bytes(self, one: Instruction, operands: list[Instruction]) -> float:
        """Operands and results, but of what is only cut out of or put into: the part alone."""
        fused = self._fused(one)
        if _is_part(fused):
            # What it goes on with, and hands on, was counted at its start.
            outputs, places = _aliased(one)
            read = sum(_hbm(o.arrays) for i, o in enumerate(operands) if i not in places)
            return read + sum(
                a.size for i, a in enumerate(one.arrays) if a.in_hbm and i not in outputs
            )
        users: dict[str, list[Instruction]] = {}
        for each in fused.values():
            for name in each.operands:
                users.setdefault(name, []).append(each)
        total = 0.0
        for each in fused.values():
            if each.opcode == "parameter":
                operand = operands[int(each.operands[0])].arrays[0]
                if operand.in_hbm:
                    total += _read(fused, each, users, operand.size)
        roots = [each for each in fused.values() if each.is_root]
        if roots[0].opcode == "tuple":
            roots = [fused[name] for name in roots[0].operands]
        for root, result in zip(roots, one.arrays, strict=True):
            while root.opcode in SAME and root.operands[0] in fused:
                root = fused[root.operands[0]]
            if result.in_hbm:
                place = PUTS.get(root.opcode)
                total += (result if place is None else fused[root.operands[place]].arrays[0]).size
        return total

    # ---- collectives

    def _groups(self, one: Instruction) -> np.ndarray:
        return replica_groups(one.attributes, math.prod(self._axes.values()))

    def _across(self, groups: np.ndarray) -> str:
        """Mesh axes over which a collective's groups extend, joined by `+`."""
        sizes = tuple(self._axes.values())
        places = np.stack(np.unravel_index(groups, sizes), axis=-1)
        differs = (places != places[:, :1]).any(axis=(0, 1))
        names = [name for name, yes in zip(self._axes, differs, strict=True) if yes]
        return "+".join(names) or "none"

    def largest_arrays(self, number: int) -> list[tuple[str, str, float]]:
        """Shape, maker and bytes of the largest arrays that the program makes in HBM, not counting
        those of a shape that its arguments have."""
        entry = self._computations[self._entry]
        given = {a for each in entry.values() if each.opcode == "parameter" for a in each.arrays}
        everything = [one for each in self._computations.values() for one in each.values()]
        fused = {
            name for one in everything if one.opcode == "fusion" for name in one.called("calls")
        }
        found: dict[Array, str] = {}
        for name, computation in self._computations.items():
            for one in computation.values():
                if name in fused or one.opcode in (*FREE, "while", "conditional", "call"):
                    continue
                for array in one.arrays:
                    if array.in_hbm and array not in given:
                        found.setdefault(array, _op_name(one))
        ranked = sorted(found.items(), key=lambda item: -item[0].size)
        return [(str(array), maker, array.size) for array, maker in ranked[:number]]


def _host_bytes(one: Instruction) -> float:
    """What an instruction moves between HBM and the host's memory."""
    if one.opcode == "copy-start":
        source, target = one.arrays[:2]
        return source.size * (source.on_host != target.on_host)
    if one.opcode not in HOST_PARTS or not one.arrays[0].on_host:
        return 0.0
    return one.arrays[HOST_PARTS[one.opcode]].size


def _op_name(one: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', one.attributes)
    return found[1] if found else one.name


def _is_part(fused: Computation) -> bool:
    """Whether a fusion does a part of a collective that runs beside other work: its start, its end,
    or some work and the collective meanwhile. The collective stands in each of these."""
    opcodes = {each.opcode for each in fused.values()}
    return "custom-call" in opcodes and not opcodes.isdisjoint(COLLECTIVES)


def _aliased(one: Instruction) -> tuple[set[int], set[int]]:
    """Which results of a fusion are operands as they came, and which operands these are."""
    pairs = re.findall(r"\{(\d*)\}: \((\d+), \{\}\)", one.attributes)
    return {int(result or 0) for result, _ in pairs}, {int(operand) for _, operand in pairs}


def _hbm(arrays: tuple[Array, ...]) -> float:
    return sum(array.size for array in arrays if array.in_hbm)


def _read(
    fused: Computation, parameter: Instruction, users: dict[str, list[Instruction]], size: float
) -> float:
    """Bytes read of a fusion's parameter."""
    total = 0.0
    for user in users.get(parameter.name, []):
        if user.opcode in ("dynamic-slice", "gather", "slice"):
            total += user.arrays[0].size
        elif user.opcode in SAME:
            total += _read(fused, user, users, size)
        elif user.opcode == "scatter" and user.operands[0] == parameter.name:
            total += fused[user.operands[PUTS["scatter"]]].arrays[0].size
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != parameter.name:
            return size
    return min(total, size)
