"""Costs of one instruction of a compiled program, per run of it: FLOPs, and bytes of HBM and of
host memory; of kernels as their authors state them, or by the shapes of JAX's attention kernels."""

import math
import re

import numpy as np

from grok.plan.hlo import COLLECTIVES, Array, Computation, Instruction, roots_of

# Matrix products per block in splash attention: forward, and backward for either side.
SPLASH_MATMULS = {"fwd": 2, "dq": 3, "dkv": 4}

# Instructions that update a part of an array in place -> the operand with that part.
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}

# Instructions that start to read a part of an array in host memory, or to write one -> the element
# of the result with that part.
HOST_TRANSFERS = {"dynamic-slice-start": -2, "dynamic-update-slice-start": 1}

EIGHT_BIT_TYPES = ("s8", "u8", "f8e4m3fn", "f8e5m2")

# Instructions inside a fusion that compute only those elements that are asked for.
ELEMENTWISE = ("bitcast", "convert", "copy", "reshape", "transpose")


def matmul_flops(computation: Computation, instruction: Instruction) -> float:
    """FLOPs of a matrix product (two for each multiplication) or of a kernel; 0 for others."""
    if instruction.opcode == "dot":
        left = computation[instruction.operands[0]].arrays[0]
        match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        contracted = [left.shape[int(d)] for d in match[1].split(",") if d] if match else []
        return 2 * math.prod((*instruction.arrays[0].shape, *contracted))
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    return kernel_cost(computation, instruction)[0] if instruction.opcode == "custom-call" else 0.0


def multiplies_8_bits(computation: Computation, instruction: Instruction) -> bool:
    """True of a product of 8-bit values with 8-bit values; kernels say so by a name that begins
    with `scaled_`. Where one operand alone has such, as do weights in int8, it is converted."""
    if instruction.opcode == "custom-call":
        return instruction.name.startswith("scaled_")
    operands = [computation[name] for name in instruction.operands if name in computation]
    arrays = [array for operand in operands for array in operand.arrays[:1]]
    return sum(array.dtype in EIGHT_BIT_TYPES for array in arrays) == 2


def _convolution_flops(computation: Computation, conv: Instruction) -> float:
    """FLOPs of a convolution without padding and holes. TPU programs express all matrix products as
    convolutions; batch dimensions become dilated windows with one real element each."""
    left, right = (computation[name].arrays[0] for name in conv.operands[:2])
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", conv.attributes)
    assert labels, conv.attributes
    match = re.search(r"window=\{([^}]*)\}", conv.attributes)
    fields = dict(field.split("=") for field in match[1].split()) if match else {}

    def field(key: str, d: int, default: int) -> int:
        """The value of a dimension; of `pad`, the one in front."""
        return int(fields[key].split("x")[d].split("_")[0]) if key in fields else default

    def size(side: int, label: str) -> int:
        """Size of a labelled dimension of the input (1), the window (2) or the output (3)."""
        return (left, right, conv.arrays[0])[side - 1].shape[labels[side].index(label)]

    pairs = 1  # of an output and a window position that meet a real input
    for d in range(sum(label.isdigit() for label in labels[3])):
        window = np.arange(size(2, str(d))) * field("rhs_dilate", d, 1) - field("pad", d, 0)
        stride, hole, met = field("stride", d, 1), field("lhs_dilate", d, 1), 0
        for start in range(0, size(3, str(d)), 4096):  # in chunks, since there may be millions
            at = np.arange(start, min(start + 4096, size(3, str(d))))[:, None] * stride + window
            met += int(((at >= 0) & (at % hole == 0) & (at // hole < size(1, str(d)))).sum())
        pairs *= met
    return 2.0 * size(3, "b") * size(3, "f") * size(2, "i") * pairs


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
    if opcode == "custom-call" and (size := kernel_cost(computation, instruction)[1]) is not None:
        return size
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
    """True if a fusion is part of a collective that overlaps with other work: its start, its end or
    other work meanwhile, in each of which the collective stands."""
    opcodes = {inner.opcode for inner in fused.values()}
    return "custom-call" in opcodes and not opcodes.isdisjoint(COLLECTIVES)


def ends_in_slice(fused: Computation) -> bool:
    """True if the computation returns a slice of an array."""
    root = roots_of(fused)[0]
    while root.opcode in ("bitcast", "copy"):
        root = fused[root.operands[0]]
    return root.opcode == "dynamic-slice"


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
    if len(roots := roots_of(fused)) != len(fusion.arrays):  # one operation with several results
        return total + _size(fusion.arrays)
    for root, result in zip(roots, fusion.arrays, strict=True):
        while root.opcode in ELEMENTWISE and root.operands[0] in fused:
            root = fused[root.operands[0]]
        if result.in_hbm:
            update = UPDATES.get(root.opcode)
            total += (result if update is None else fused[root.operands[update]].arrays[0]).size
    return total


def _bytes_read(
    fused: Computation, parameter: Instruction, users: dict[str, list[Instruction]], size: float
) -> float:
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


def kernel_cost(computation: Computation, kernel: Instruction) -> tuple[float, float | None]:
    """FLOPs, and bytes of HBM, of a custom call; 0 and None where they are not known."""
    if match := re.match(r"splash_mha_(fwd|dq|dkv)_", kernel.name):
        return _splash(computation, kernel, SPLASH_MATMULS[match[1]])
    if kernel.name.startswith("ragged_paged_attention"):
        return _ragged(computation, kernel)
    estimate = r'"cost_estimate":\{[^}]*"%s":"?(\d+)'
    flops = re.search(estimate % "flops", kernel.attributes)
    size = re.search(estimate % "bytes_accessed", kernel.attributes)
    return float(flops[1]) if flops else 0.0, float(size[1]) if size else None


def _splash(computation: Computation, kernel: Instruction, matmuls: int) -> tuple[float, float]:
    """FLOPs and bytes of splash attention. Blocks above the diagonal are skipped, and those behind
    a window; each other block reads two arrays of the side that is streamed: keys and values, or
    queries and the gradient of the output."""
    arrays = [computation[name].arrays[0] for name in kernel.operands]
    *rows, heads, length, width = arrays[2].shape
    # The schedule has one side's blocks, and as many of the other's as one of these meets at most.
    meetings, splits = sorted(arrays[0].shape[-2:])
    pairs = splits * meetings - meetings * (meetings - 1) // 2
    side, blocks = length // splits, math.prod(rows) * heads * pairs
    flops = 2.0 * matmuls * blocks * side**2 * width
    once = sum(a.size for a in (*arrays[5:], *kernel.arrays) if a.in_hbm) + arrays[2].size
    return flops, once + 2 * blocks * side * width * 2


def _ragged(computation: Computation, kernel: Instruction) -> tuple[float, float]:
    """FLOPs and bytes of ragged paged attention with full caches: all pages of the table; of
    prompts, which have as many queries as keys, half, since a query sees the keys before it."""
    arrays = [computation[name].arrays[0] for name in kernel.operands]
    table, q, kv = arrays[1], arrays[-2], arrays[-1]
    queries = q.shape[0] // table.shape[0]
    keys = (1.0 if queries == 1 else 0.5) * math.prod(table.shape) * kv.shape[1]
    flops = 2.0 * 2 * keys * queries * q.shape[1] * q.shape[2]
    return flops, 2 * q.size + keys * (kv.size / math.prod(kv.shape[:2]))
