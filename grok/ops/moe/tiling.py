"""Sizes of tiles of rows and of blocks of weights, on TPU and in plain XLA.

Letters: R rows (tokens), C chosen experts of a row, E experts, K contracted axis, N columns.
An expert's fair share is R*C/E rows.
"""

from collections.abc import Iterator
from typing import NamedTuple

from grok.hardware import LANES, has_large_vmem, has_little_hbm, has_small_vmem, vmem_bytes

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
MIN_VMEM_LIMIT_BYTES, LARGE_BLOCK_BYTES = 16 * 2**20, 40 * 2**20
RESERVED_SHARE = 64  # of the vector memory, that no kernel gets
STACK_BYTES = 2**19  # of what the compiler keeps beside blocks, sums and rows
# Least columns of one of several parts in the forward pass: below some 1100, a v6e reads and writes
# the rows' sum over parts for longer than it multiplies.
MIN_FORWARD_WIDTH = 2048
HALVINGS = 8  # of the budgets, until blocks fit: the last are a tile or two


class KernelBytes(NamedTuple):
    """Bytes of a number of all arrays of a kind together, of a kernel that multiplies tiles of M
    rows, in blocks (M, tk), by blocks of weights (tk, tn)."""

    rows: int
    weights: float
    results: int  # with what they start from
    sums: int = 4
    row: int = 2  # of one array of rows
    column: int = 0  # of what belongs to a column of weights: scales, and a converted group
    row_scales: int = 0  # of the scales of a row

    def of_blocks(self, M: int, tk: int, tn: int, buffers: int) -> int:
        """Bytes of all blocks, and of a sum and a product, or two sums, in float32."""
        rows = M * (2 * tk * self.rows + tn * (2 * self.results + 8) + 2 * self.row_scales)
        return rows + int(buffers * tk * tn * self.weights)

    def required(self, M: int, tk: int, tn: int, buffers: int) -> int:
        """Bytes that the compiler takes: all blocks and sums, a copy of one block of rows, and
        some more."""
        rows = M * (tk * (2 * self.rows + self.row) + tn * (2 * self.results + self.sums))
        rows += 2 * M * self.row_scales
        return rows + int(buffers * tk * tn * self.weights) + tn * self.column + STACK_BYTES


def kernel_tile_rows(R: int, C: int, E: int) -> int:
    """Rows of a kernel's tile: an eighth of a fair share, but between 128, below which a matrix
    unit gains nothing, and 512, or 256 where weights take most of the vector memory; and no more
    than there are rows."""
    eighth = R * C // (8 * E) // LANES * LANES
    low = has_large_vmem() or has_small_vmem()
    return min(max(eighth, LANES), (2 if low else 4) * LANES, -(-R // 16) * 16)


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


def weight_blocks(
    M: int, K: int, N: int, size: KernelBytes, many_tiles: bool
) -> tuple[int, int, int]:
    """Sides of a block of weights (K, N) for tiles of M rows, and its number of buffers: the
    largest that the budget allows and the compiler grants.

    Where a block stays for many tiles, the time to read the next is little beside theirs, and a
    wider block reads the rows less often. Otherwise one buffer is filled while the other is used.
    """
    candidates = list(_weight_blocks(K, N, size.weights, many_tiles))
    fitting = (b for b in candidates if size.required(M, *b) <= max_vmem_limit())
    return next(fitting, candidates[-1])


def _weight_blocks(K: int, N: int, itemsize: float, many_tiles: bool) -> Iterator[tuple]:
    """Blocks by falling size."""
    budget = _budget()
    for halving in range(HALVINGS):
        tk, tn = _block_sides(K, N, itemsize, budget.resident_block_bytes >> halving)
        if many_tiles and tk == K:
            yield tk, tn, 1
        else:
            yield *_block_sides(K, N, itemsize, budget.weight_bytes // 2 >> halving), 2


def gradient_blocks(M: int, K: int, N: int, itemsize: int, row_itemsize: int) -> tuple[int, int]:
    """Sides of a block of a weight gradient (K, N) of `itemsize` that tiles of M rows add to: the
    largest that the compiler grants."""
    rows, columns = _budget().gradient_block
    blocks = []
    for halving in range(HALVINGS):
        largest = rows >> (halving + 1) // 2, columns >> halving // 2
        tk, tn = _lane_divisor(K, largest[0]), _lane_divisor(N, largest[1])
        blocks.append((tk, tn))
        row_bytes = M * (3 * tk + 2 * tn) * row_itemsize  # with a copy of one block
        if tk * tn * (2 * itemsize + 4) + row_bytes + STACK_BYTES <= max_vmem_limit():
            break
    return blocks[-1]


def vmem_limit(block_bytes: int, required: int = 0) -> int:
    """Vector memory to ask for, in bytes: the blocks, and a quarter more for the compiler, or where
    they take most of a small memory, a third; at least what is `required`."""
    share = 3 if block_bytes > LARGE_BLOCK_BYTES and not has_large_vmem() else 4
    limit = max(MIN_VMEM_LIMIT_BYTES, block_bytes + block_bytes // share, required)
    return min(limit, max_vmem_limit())


def max_vmem_limit() -> int:
    """Vector memory that a kernel can get, in bytes."""
    return vmem_bytes() - vmem_bytes() // RESERVED_SHARE


def _budget() -> VmemBudget:
    return LARGE_VMEM if has_large_vmem() else VMEM


def _block_sides(K: int, N: int, itemsize: float, block_bytes: int) -> tuple[int, int]:
    """Sides of a block of `block_bytes`: all of K, if that leaves some 512 columns."""
    tk = _lane_divisor(K, int(block_bytes / (4 * LANES * itemsize)))
    return tk, _lane_divisor(N, max(LANES, int(block_bytes / (tk * itemsize))))


def _lane_divisor(size: int, largest: int) -> int:
    """The largest divisor of `size` up to `largest`, or to one group of lanes, that is whole lanes,
    else all of `size`."""
    largest = max(largest, LANES)
    divisors = (d for d in range(largest // LANES * LANES, 0, -LANES) if size % d == 0)
    return size if size <= largest else next(divisors, size)


class MlpSplits(NamedTuple):
    """Parts of the experts' width that are one after the other in each pass."""

    forward: int
    backward: int


def mlp_splits(F: int, multiple: int) -> MlpSplits:
    """Parts that are multiples of `multiple` for the devices that are traced for: more where HBM is
    scarce, there in both passes; 1 where none go into the width."""
    numbers = (4, 2) if has_little_hbm() else (2,)
    parts = [n for n in numbers if F % (n * multiple) == 0] + [1]
    wide = (n for n in parts if F // n >= MIN_FORWARD_WIDTH and has_little_hbm())
    return MlpSplits(next(wide, 1), parts[0])
