"""What kernels cost: as their authors state it, and for JAX's kernels of attention, whose authors
state nothing, as their shapes say."""

import math
import re

from grok.plan.hlo import Computation, Instruction

# Products of queries, keys and values that splash makes: forward, and backward for either side.
SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}


def kernel_flops(inside: Computation, one: Instruction) -> float:
    """FLOPs of a custom call, 0 where nothing is known of it."""
    return _attention(inside, one)[0] or stated(one, "flops") or 0.0


def kernel_bytes(inside: Computation, one: Instruction) -> float | None:
    """Bytes of HBM that a custom call reads and writes; None where nothing is known of it."""
    return _attention(inside, one)[1] or stated(one, "bytes_accessed")


def stated(one: Instruction, what: str) -> float | None:
    """A number of the cost estimate that a kernel's author gave, if any."""
    found = re.search(rf'"cost_estimate":\{{[^}}]*"{what}":"?(\d+)', one.attributes)
    return float(found[1]) if found else None


def _attention(inside: Computation, one: Instruction) -> tuple[float, float]:
    """FLOPs and bytes of a kernel of attention, zeros for others."""
    if found := re.match(r"splash_mha_(fwd|dq|dkv)_", one.name):
        return _splash(inside, one, SPLASH[found[1]])
    if one.name.startswith("ragged_paged_attention"):
        return _ragged(inside, one)
    return 0.0, 0.0


def _splash(inside: Computation, one: Instruction, products: int) -> tuple[float, float]:
    """Blocks above the diagonal are passed over; each other one reads its part of the side that is
    not held, twice: keys and values, or queries and the gradient of the output."""
    arrays = [inside[name].arrays[0] for name in one.operands]
    parts, (*rows, heads, length, width) = arrays[0].shape[-2], arrays[2].shape
    side, blocks = length // parts, math.prod(rows) * heads * parts * (parts + 1) // 2
    flops = 2.0 * products * blocks * side**2 * width
    once = sum(a.size for a in (*arrays[5:], *one.arrays) if a.in_hbm) + arrays[2].size
    return flops, once + 2 * blocks * side * width * 2


def _ragged(inside: Computation, one: Instruction) -> tuple[float, float]:
    """All pages of the table, as when caches are full; of prompts, which have as many queries as
    keys, half: a query sees the keys before it."""
    arrays = [inside[name].arrays[0] for name in one.operands]
    table, q, kv = arrays[1], arrays[-2], arrays[-1]
    queries = q.shape[0] // table.shape[0]
    share = 1.0 if queries == 1 else 0.5
    keys = share * math.prod(table.shape) * kv.shape[1]
    flops = 2.0 * 2 * keys * queries * q.shape[1] * q.shape[2]
    token = kv.size / math.prod(kv.shape[:2])
    return flops, 2 * q.size + keys * token
