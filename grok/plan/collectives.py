"""Collectives in a compiled program: which devices take part, and how much each of them sends."""

import math
import re

import numpy as np

from grok.plan.hlo import Computation, Instruction, roots_of

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all",
)  # fmt: skip


def replica_groups(attributes: str, num_devices: int) -> np.ndarray:
    """Devices of each group, [groups, members], from any of XLA's three ways to write them."""
    match = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes)
    if match:
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
    match = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", attributes)
    if match:
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


def ends_in_slice(fused: Computation) -> bool:
    """True if the computation returns a slice of an array."""
    root = roots_of(fused)[0]
    while root.opcode in ("bitcast", "copy"):
        root = fused[root.operands[0]]
    return root.opcode == "dynamic-slice"
