"""Costs of a compiled TPU program on one device, read from its text. XLA's own cost analysis counts
the body of a loop once; here each computation counts as often as it runs: as a loop's comparison of
its counter with a constant says, or else as the caller says."""

import math
import re
from collections import defaultdict

import numpy as np

from grok.plan.hlo import COLLECTIVES, Array, Computation, Instruction, inline_fusions, parse_hlo
from grok.plan.instruction_costs import (
    ends_in_slice,
    hbm_bytes,
    host_bytes,
    is_async_collective,
    kernel_cost,
    matmul_flops,
    multiplies_8_bits,
)

# Names, views and bookkeeping: nothing is read or written.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "copy-done",
    "partition-id", "replica-id", "iota", "opt-barrier", "domain", "call-done",
}  # fmt: skip


class Cost:
    """Costs on one device."""

    def __init__(self) -> None:
        self.flops = 0.0  # of matrix products
        self.flops_8bit = 0.0  # of these, of 8-bit values
        self.hbm = 0.0  # bytes read and written
        self.host = 0.0  # bytes to and from host memory
        # Bytes sent in collectives, by mesh axes and kind.
        self.collectives: dict[tuple[str, str], float] = defaultdict(float)
        self.loops: dict[str, float] = defaultdict(float)  # whose count the caller gave
        self.kernels: dict[str, float] = defaultdict(float)  # custom calls of known cost

    def add(self, other: "Cost", times: float = 1) -> None:
        """Adds another cost, so many times."""
        self.flops += times * other.flops
        self.flops_8bit += times * other.flops_8bit
        self.hbm += times * other.hbm
        self.host += times * other.host
        for name in ("collectives", "loops", "kernels"):
            for key, value in getattr(other, name).items():
                getattr(self, name)[key] += times * value


class CompiledProgram:
    """A compiled program and its costs."""

    def __init__(self, text: str, mesh_sizes: dict[str, int], loop_count: float = 1):
        """Reads `text`. `mesh_sizes`: of the mesh axes, in order; `loop_count`: runs of loops whose
        count the text does not have. Conditionals take their dearest branch."""
        self.computations, self.entry = parse_hlo(text)
        self._mesh_sizes, self._loop_count = mesh_sizes, loop_count
        self._costs: dict[str, Cost] = {}
        self._inlined: dict[str, Computation] = {}

    def cost(self) -> Cost:
        """The cost of one run of the whole program."""
        return self._computation_cost(self.entry)

    def collective_axes(self) -> list[str]:
        """Mesh axes that collectives use, in branches that the cost leaves out too."""
        self.cost()
        return sorted({axes for cost in self._costs.values() for axes, _ in cost.collectives})

    def largest_arrays(self, number: int) -> list[tuple[str, str, float]]:
        """Shape, operation and bytes of the largest arrays that the program makes in HBM, except
        shapes that its arguments have."""
        instructions = [i for c in self.computations.values() for i in c.values()]
        entry = self.computations[self.entry].values()
        arguments = {a for i in entry if i.opcode == "parameter" for a in i.arrays}
        fused = {name for i in instructions if i.opcode == "fusion" for name in i.called("calls")}
        operations: dict[Array, str] = {}
        for name, computation in self.computations.items():
            for instruction in computation.values() if name not in fused else ():
                if instruction.opcode in (*FREE, "while", "conditional", "call"):
                    continue
                for array in instruction.arrays:
                    if array.in_hbm and array not in arguments:
                        operations.setdefault(array, instruction.op_name)
        ranked = sorted(operations.items(), key=lambda item: -item[0].size)
        return [(str(array), operation, array.size) for array, operation in ranked[:number]]

    def _computation_cost(self, name: str) -> Cost:
        if name not in self._costs:
            total = Cost()
            for instruction in self.computations[name].values():
                total.add(self.instruction_cost(self.computations[name], instruction))
            self._costs[name] = total
        return self._costs[name]

    def instruction_cost(self, computation: Computation, instruction: Instruction) -> Cost:
        """The cost of one instruction, with what it calls."""
        opcode = instruction.opcode
        if opcode in FREE or opcode.endswith(("-done", "-update")):
            return Cost()
        if opcode == "while":
            return self._loop_cost(computation, instruction)
        total = Cost()
        if opcode == "conditional":
            costs = map(self._computation_cost, self.branches(instruction))
            total.add(max(costs, key=lambda cost: (cost.flops, cost.hbm)))
            return total
        if opcode in ("call", "call-start", "async-start"):
            for called in instruction.called("to_apply") or instruction.called("calls"):
                total.add(self._computation_cost(called))
            return total
        fused = self.fused(instruction) if opcode == "fusion" else {}
        total.host = host_bytes(instruction)
        # Of a transfer to or from host memory, one end is in HBM.
        total.hbm = total.host or hbm_bytes(computation, instruction, fused)
        if "_xla_megascale_transfer_type" in instruction.attributes:
            if opcode == "send":  # bytes for the host and the network, to all slices
                match = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
                kind = match[1].lower().replace("_", "-") if match else "send"
                sent = bytes_sent(computation, instruction, kind, self._mesh_sizes["slice"])
                total.collectives["slice", kind] += sent
        elif fused:
            is_start = instruction.name.startswith("async-collective-start")
            sends = is_start or not is_async_collective(fused)
            for inner in fused.values():
                if sends or inner.opcode.removesuffix("-start") not in COLLECTIVES:
                    self._add_work(total, fused, inner)
        else:
            self._add_work(total, computation, instruction)
        if opcode == "custom-call" and kernel_cost(computation, instruction)[0]:
            total.kernels[instruction.op_name] += 1
        return total

    def _add_work(self, total: Cost, computation: Computation, instruction: Instruction) -> None:
        flops = matmul_flops(computation, instruction)
        total.flops += flops
        total.flops_8bit += flops * multiplies_8_bits(computation, instruction)
        if (kind := instruction.opcode.removesuffix("-start")) not in COLLECTIVES:
            return
        groups = replica_groups(instruction.attributes, math.prod(self._mesh_sizes.values()))
        # A TPU has a reduce-scatter as an all-reduce fused with a slice of its result.
        if kind == "all-reduce" and ends_in_slice(computation):
            kind = "reduce-scatter"
        sent = bytes_sent(computation, instruction, kind, groups.shape[1])
        total.collectives[self._mesh_axes(groups), kind] += sent

    def _loop_cost(self, computation: Computation, loop: Instruction) -> Cost:
        total = Cost()
        if self._constant_count(computation, loop) is None:
            total.loops[loop.op_name] += 1
        body = self._computation_cost(loop.called("body")[0])
        total.add(body, self.trip_count(computation, loop))
        return total

    def branches(self, conditional: Instruction) -> list[str]:
        """Computations of which a conditional runs one."""
        keys = ("branch_computations", "true_computation", "false_computation")
        return [name for key in keys for name in conditional.called(key)]

    def trip_count(self, computation: Computation, loop: Instruction) -> float:
        """Runs of a loop."""
        times = self._constant_count(computation, loop)
        return self._loop_count if times is None else times

    def _constant_count(self, computation: Computation, loop: Instruction) -> int | None:
        """Runs of a loop whose condition is `counter < constant` and whose counter starts at a
        constant; None for others."""
        condition = self.computations[loop.called("condition")[0]]
        root = next(i for i in condition.values() if i.is_root)
        if root.opcode == "fusion":
            operands = [condition[name] for name in root.operands]
            condition = {
                name: operands[int(i.operands[0])] if i.opcode == "parameter" else i
                for name, i in self.computations[root.called("calls")[0]].items()
            }
            root = next(i for i in condition.values() if i.is_root)
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        first, limit = (_initial_value(condition[i], computation, loop) for i in root.operands)
        return None if first is None or limit is None else max(0, limit - first)

    def fused(self, fusion: Instruction) -> Computation:
        """Instructions that a fusion computes, with the fusions inside it looked through."""
        (name,) = fusion.called("calls")
        if name not in self._inlined:
            self._inlined[name] = inline_fusions(self.computations, name)
        return self._inlined[name]

    def _mesh_axes(self, groups: np.ndarray) -> str:
        coordinates = np.stack(np.unravel_index(groups, tuple(self._mesh_sizes.values())), axis=-1)
        differs = (coordinates != coordinates[:, :1]).any(axis=(0, 1))
        names = [name for name, yes in zip(self._mesh_sizes, differs, strict=True) if yes]
        return "+".join(names) or "none"


def _initial_value(value: Instruction, computation: Computation, loop: Instruction) -> int | None:
    """A number of a loop's condition before its first iteration; None unless it is a constant."""
    if value.opcode == "get-tuple-element":
        match = re.search(r"index=(\d+)", value.attributes)
        carry = computation[loop.operands[0]]
        if carry.opcode != "tuple":
            return None
        assert match
        value = computation[carry.operands[int(match[1])]]
    while value.opcode in ("copy", "bitcast"):
        value = computation[value.operands[0]]
    if value.opcode == "constant" and re.fullmatch(r"-?\d+", value.operands[0]):
        return int(value.operands[0])
    return None


def replica_groups(attributes: str, num_devices: int) -> np.ndarray:
    """Devices of each group, [groups, members], from any of XLA's three ways to write them."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        axes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        names, sizes = list(axes), [int(size) for size in axes.values()]
        members = [names.index(name) for name in re.findall(r"'([^']+)'", match[2])]
        others = [axis for axis in range(len(names)) if axis not in members]
        ids = np.arange(num_devices).reshape(sizes).transpose(*others, *members)
        return ids.reshape(-1, math.prod(sizes[axis] for axis in members))
    match = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if match:
        ids = np.arange(num_devices).reshape([int(n) for n in match[3].split(",")])
        if match[4]:
            ids = ids.transpose([int(n) for n in match[4].split(",")])
        return ids.reshape(int(match[1]), int(match[2]))
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", attributes):
        groups = re.findall(r"\{([\d,]+)\}", match[1])
        return np.array([[int(n) for n in group.split(",")] for group in groups])
    return np.arange(num_devices)[None, :]


def bytes_sent(computation: Computation, collective: Instruction, kind: str, members: int) -> float:
    """Bytes that a device sends in a collective of so many, by the algorithms that send least: each
    device passes on partial sums, or the shards that it has."""
    operands = [computation[name] for name in collective.operands if name in computation]
    size = sum(array.size for operand in operands for array in operand.arrays)
    if kind == "collective-permute":
        return size
    if kind == "all-gather":
        return size * (members - 1)
    return (2 if kind == "all-reduce" else 1) * size * (members - 1) / members
