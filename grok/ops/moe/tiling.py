"""Sizes of tiles of rows and of blocks of weights, on TPU and in plain XLA.

Letters: R rows (tokens), C chosen experts of a row, E experts, K contracted axis, N columns.
An expert's fair share is R*C/E rows.
"""

from typing import NamedTuple

from grok.hardware import LANES, has_large_vmem

# Rows up to which a matrix is read in place faster than copied and multiplied, on CPU.
MAX_MATVEC_ROWS = 8


class VmemBudget(NamedTuple):
    """Vector memory of a TPU core that blocks may take."""

    weight_bytes: int  # all buffers of the weights' blocks
    resident_block_bytes: int  # one block that stays for many tiles
    gradient_block: tuple[int, int]  # largest sides of a block of a weight gradient, in float32


VMEM, LARGE_VMEM = (
    VmemBudget(24 * 2**20, 24 * 2**20, (2048, 2048)),
    VmemBudget(48 * 2**20, 96 * 2**20, (3072, 4096)),
)
MIN_VMEM_LIMIT_BYTES, LARGE_VMEM_LIMIT_BYTES = 16 * 2**20, 126 * 2**20
LARGE_BLOCK_BYTES = 40 * 2**20


def kernel_tile_rows(R: int, C: int, E: int) -> int:
    """Rows of a kernel's tile: an eighth of a fair share, but between 128, below which a matrix
    unit gains nothing, and 512, or 256 where weights take most of the vector memory; and no more
    than there are rows."""
    eighth = R * C // (8 * E) // LANES * LANES
    largest = (2 if has_large_vmem() else 4) * LANES
    return min(max(eighth, LANES), largest, -(-R // 16) * 16)


def xla_tile_rows(R: int, C: int, E: int) -> int:
    """Rows of a tile in plain XLA: half a fair share, since an expert's last tile is half empty on
    average."""
    half = R * C // (2 * E)
    return min(512, max(8, -(-half // 8) * 8))


def training_tile_rows(R: int, C: int, E: int) -> tuple[int, ...]:
    """Rows of the tiles where gradients are wanted: a fair share, since many small products take
    longer than a large one, then an eighth of it for the remainder."""
    share = -(-R * C // E)
    if share < 64:
        return (-(-share // 8) * 8,)
    large = min(512, share // 64 * 64)
    return large, large // 8


def serving_tile_rows(R: int, C: int, E: int) -> int:
    """Rows of a tile of a serving step: where rows are few, twice a fair share, so that nearly
    always one tile holds all rows of an expert and little of it is empty."""
    usual, share = xla_tile_rows(R, C, E), -(-R * C // E)
    return usual if usual > MAX_MATVEC_ROWS else min(R, 2 * share, MAX_MATVEC_ROWS)


def weight_blocks(K: int, N: int, itemsize: int, many_tiles: bool) -> tuple[int, int, int]:
    """Sides of a block of weights (K, N), and its number of buffers.

    `itemsize` is the sum over the matrices that are read together. Where a block stays for many
    tiles, the time to read the next is little beside theirs, and a wider block reads the rows less
    often. Otherwise one buffer is filled while the other is used.
    """
    budget = _budget()
    if many_tiles:
        tk, tn = _block_sides(K, N, itemsize, budget.resident_block_bytes)
        if tk == K:
            return tk, tn, 1
    return *_block_sides(K, N, itemsize, budget.weight_bytes // 2), 2


def gradient_blocks(K: int, N: int) -> tuple[int, int]:
    """Sides of a block of a weight gradient (K, N)."""
    largest = _budget().gradient_block
    return _lane_divisor(K, largest[0]), _lane_divisor(N, largest[1])


def vmem_limit(block_bytes: int) -> int:
    """Vector memory to ask for, in bytes: the blocks, and a quarter more for the compiler, or where
    they take most of a small memory, a third."""
    share = 3 if block_bytes > LARGE_BLOCK_BYTES and not has_large_vmem() else 4
    limit = max(MIN_VMEM_LIMIT_BYTES, block_bytes + block_bytes // share)
    return min(limit, LARGE_VMEM_LIMIT_BYTES) if has_large_vmem() else limit


def _budget() -> VmemBudget:
    return LARGE_VMEM if has_large_vmem() else VMEM


def _block_sides(K: int, N: int, itemsize: int, block_bytes: int) -> tuple[int, int]:
    """Sides of a block of `block_bytes`: all of K, if that leaves some 512 columns."""
    tk = _lane_divisor(K, block_bytes // (4 * LANES * itemsize))
    return tk, _lane_divisor(N, max(LANES, block_bytes // (tk * itemsize)))


def _lane_divisor(size: int, largest: int) -> int:
    """The largest divisor of `size` up to `largest` that is whole lanes, else all of `size`."""
    divisors = (d for d in range(largest // LANES * LANES, 0, -LANES) if size % d == 0)
    return size if size <= largest else next(divisors, size)
