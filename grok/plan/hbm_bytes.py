"""Bytes that one instruction of a compiled program reads from memory and writes to it."""

import re

from grok.plan.collectives import COLLECTIVES
from grok.plan.hlo import Array, Computation, Instruction, roots_of
from grok.plan.kernels import kernel_bytes

# Instructions that update a part of an array in place -> the operand with that part.
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}

# Instructions that start to read a part of an array in host memory, or to write one -> the element
# of the result with that part.
HOST_TRANSFERS = {"dynamic-slice-start": -2, "dynamic-update-slice-start": 1}

# Instructions inside a fusion that compute only those elements that are asked for.
ELEMENTWISE = ("bitcast", "convert", "copy", "reshape", "transpose")


def host_bytes(instruction: Instruction) -> float:
    """Bytes that an instruction moves between HBM and host memory."""
    if instruction.opcode == "copy-start":
        source, target = instruction.arrays[:2]
        return source.size * (source.on_host != target.on_host)
    if instruction.opcode not in HOST_TRANSFERS or not instruction.arrays[0].on_host:
        return 0.0
    return instruction.arrays[HOST_TRANSFERS[instruction.opcode]].size


def hbm_bytes(computation: Computation, instruction: Instruction, fused: Computation) -> float:
    """Bytes of HBM that an instruction of `computation` reads and writes; `fused` is what a fusion
    computes."""
    opcode, arrays = instruction.opcode, instruction.arrays
    if opcode == "copy-start":
        source, target = arrays[:2]
        return source.size * source.in_hbm + target.size * target.in_hbm
    if opcode == "recv":
        return _size(arrays)
    operands = [computation[name] for name in instruction.operands if name in computation]
    if opcode == "send":
        return _size(operands[0].arrays)
    if opcode == "custom-call":
        stated = kernel_bytes(computation, instruction)
        if stated is not None:
            return stated
    if opcode == "fusion":
        return _fusion_bytes(instruction, operands, fused)
    if opcode == "dynamic-slice":
        return _size(arrays) + arrays[0].size * operands[0].arrays[0].in_hbm
    if opcode in UPDATES:
        update = computation[instruction.operands[UPDATES[opcode]]].arrays[0]
        return 2 * update.size * arrays[0].in_hbm
    if opcode == "gather":
        return 2 * _size(arrays)
    return _size(arrays) + sum(_size(operand.arrays) for operand in operands)


def is_async_collective(fused: Computation) -> bool:
    """True if a fusion is part of a collective that overlaps with other work: its start, its end,
    or other work meanwhile. The collective stands in each of these."""
    opcodes = {inner.opcode for inner in fused.values()}
    return "custom-call" in opcodes and not opcodes.isdisjoint(COLLECTIVES)


def _fusion_bytes(fusion: Instruction, operands: list[Instruction], fused: Computation) -> float:
    """Bytes of operands and results; of an array that is sliced or updated, of the part alone."""
    if is_async_collective(fused):
        # Arrays that it passes on were counted at its start.
        aliases = re.findall(r"\{(\d*)\}: \((\d+), \{\}\)", fusion.attributes)
        passed_in = {int(operand) for _, operand in aliases}
        passed_out = {int(result or 0) for result, _ in aliases}
        read = sum(_size(o.arrays) for i, o in enumerate(operands) if i not in passed_in)
        return read + _size(tuple(a for i, a in enumerate(fusion.arrays) if i not in passed_out))
    users: dict[str, list[Instruction]] = {}
    for inner in fused.values():
        for name in inner.operands:
            users.setdefault(name, []).append(inner)
    total = 0.0
    for inner in fused.values():
        if inner.opcode == "parameter":
            operand = operands[int(inner.operands[0])].arrays[0]
            if operand.in_hbm:
                total += _bytes_read(fused, inner, users, operand.size)
    for root, result in zip(roots_of(fused), fusion.arrays, strict=True):
        while root.opcode in ELEMENTWISE and root.operands[0] in fused:
            root = fused[root.operands[0]]
        if result.in_hbm:
            update = UPDATES.get(root.opcode)
            written = result if update is None else fused[root.operands[update]].arrays[0]
            total += written.size
    return total


def _bytes_read(
    fused: Computation, parameter: Instruction, users: dict[str, list[Instruction]], size: float
) -> float:
    """Bytes that a fusion reads of a parameter of `size` bytes."""
    total = 0.0
    for user in users.get(parameter.name, []):
        if user.opcode in ("dynamic-slice", "gather", "slice"):
            total += user.arrays[0].size
        elif user.opcode in ELEMENTWISE:
            total += _bytes_read(fused, user, users, size)
        elif user.opcode == "scatter" and user.operands[0] == parameter.name:
            total += fused[user.operands[UPDATES["scatter"]]].arrays[0].size
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != parameter.name:
            return size
    return min(total, size)


def _size(arrays: tuple[Array, ...]) -> float:
    """Bytes of those arrays that lie in HBM."""
    return sum(array.size for array in arrays if array.in_hbm)
