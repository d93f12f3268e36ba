"""Collectives in a compiled program: which devices take part, and what each of them sends."""

import math
import re

import numpy as np

from grok.plan.hlo import Computation, Instruction

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)


def replica_groups(attributes: str, num_devices: int) -> np.ndarray:
    """Devices of each group, [groups, members], from any of XLA's three ways to write them."""
    found = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes)
    if found:
        axes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        names, sizes = list(axes), [int(size) for size in axes.values()]
        across = [names.index(name) for name in re.findall(r"'([^']+)'", found[2])]
        kept = [place for place in range(len(names)) if place not in across]
        ids = np.arange(num_devices).reshape(sizes).transpose(*kept, *across)
        return ids.reshape(-1, math.prod(sizes[place] for place in across))
    found = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if found:
        ids = np.arange(num_devices).reshape([int(n) for n in found[3].split(",")])
        if found[4]:
            ids = ids.transpose([int(n) for n in found[4].split(",")])
        return ids.reshape(int(found[1]), int(found[2]))
    found = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", attributes)
    if found:
        return np.array(
            [[int(n) for n in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", found[1])]
        )
    return np.arange(num_devices)[None, :]


def bytes_sent(inside: Computation, one: Instruction, kind: str, members: int) -> float:
    """Bytes that a device sends in a collective of so many, by the algorithms that send least: each
    gets its part of a sum and passes it on, or passes on what it holds."""
    whole = sum(a.size for name in one.operands if name in inside for a in inside[name].arrays)
    if kind == "collective-permute":
        return whole
    if kind == "all-gather":
        return whole * (members - 1)
    return (2 if kind == "all-reduce" else 1) * whole * (members - 1) / members


def cuts(fused: Computation) -> bool:
    """Whether the computation ends by cutting a part out."""
    roots = [one for one in fused.values() if one.is_root]
    if roots[0].opcode == "tuple":
        roots = [fused[name] for name in roots[0].operands]
    while roots[0].opcode in ("bitcast", "copy"):
        roots = [fused[roots[0].operands[0]]]
    return roots[0].opcode == "dynamic-slice"
