"""Costs of kernels: as their authors state them, and from the shapes for JAX's attention kernels,
whose authors state none."""

import math
import re

from grok.plan.hlo import Computation, Instruction

# Matrix products per block in splash attention: forward, and backward for either side.
SPLASH_MATMULS = {"fwd": 2, "dq": 3, "dkv": 4}


def kernel_flops(computation: Computation, kernel: Instruction) -> float:
    """FLOPs of a custom call; 0 if not known."""
    return _attention(computation, kernel)[0] or _stated(kernel, "flops") or 0.0


def kernel_bytes(computation: Computation, kernel: Instruction) -> float | None:
    """Bytes of HBM that a custom call reads and writes; None if not known."""
    return _attention(computation, kernel)[1] or _stated(kernel, "bytes_accessed")


def _stated(kernel: Instruction, field: str) -> float | None:
    """A number of the cost estimate that the kernel's author gave, if any."""
    match = re.search(rf'"cost_estimate":\{{[^}}]*"{field}":"?(\d+)', kernel.attributes)
    return float(match[1]) if match else None


def _attention(computation: Computation, kernel: Instruction) -> tuple[float, float]:
    """FLOPs and bytes of an attention kernel; zeros for others."""
    if match := re.match(r"splash_mha_(fwd|dq|dkv)_", kernel.name):
        return _splash(computation, kernel, SPLASH_MATMULS[match[1]])
    if kernel.name.startswith("ragged_paged_attention"):
        return _ragged(computation, kernel)
    return 0.0, 0.0


def _splash(computation: Computation, kernel: Instruction, matmuls: int) -> tuple[float, float]:
    """FLOPs and bytes of splash attention. Blocks above the diagonal are skipped; each other block
    reads two arrays of the side that is streamed: keys and values, or queries and the gradient of
    the output."""
    arrays = [computation[name].arrays[0] for name in kernel.operands]
    splits, (*rows, heads, length, width) = arrays[0].shape[-2], arrays[2].shape
    side, blocks = length // splits, math.prod(rows) * heads * splits * (splits + 1) // 2
    flops = 2.0 * matmuls * blocks * side**2 * width
    once = sum(a.size for a in (*arrays[5:], *kernel.arrays) if a.in_hbm) + arrays[2].size
    return flops, once + 2 * blocks * side * width * 2


def _ragged(computation: Computation, kernel: Instruction) -> tuple[float, float]:
    """FLOPs and bytes of ragged paged attention with full caches: all pages of the table; of
    prompts, which have as many queries as keys, half, since a query sees the keys before it."""
    arrays = [computation[name].arrays[0] for name in kernel.operands]
    table, q, kv = arrays[1], arrays[-2], arrays[-1]
    queries = q.shape[0] // table.shape[0]
    share = 1.0 if queries == 1 else 0.5
    keys = share * math.prod(table.shape) * kv.shape[1]
    flops = 2.0 * 2 * keys * queries * q.shape[1] * q.shape[2]
    token = kv.size / math.prod(kv.shape[:2])
    return flops, 2 * q.size + keys * token
