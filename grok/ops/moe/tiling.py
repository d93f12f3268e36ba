"""Blocks of matrices in a TPU core's vector memory: how large, and what memory to ask for."""

import jax

from grok.hardware import has_large_vmem

LANES = 128

# Bytes that weights may take, and the largest sides of a block of a weights' gradient, which is
# summed up in float32; and both where that memory is twice as large and more.
WEIGHTS, GRADIENT_BLOCK = 24 * 2**20, (2048, 2048)
LARGE_WEIGHTS, LARGE_GRADIENT_BLOCK = 48 * 2**20, (3072, 4096)
# There, a block that stays for many tiles may have most of it, of which this is all.
LARGE_STANDING, LARGE_MEMORY = 96 * 2**20, 126 * 2**20


def weight_blocks(K: int, N: int, itemsize: int, many_tiles: bool) -> tuple[int, int, int]:
    """Sides of a block of weights with K contracted and N columns, and how many buffers it has.

    `itemsize` is of all matrices that are read together. Where a block stays for many tiles, the
    time to read the next is little beside theirs, and a wider block reads the rows less often.
    Else one is read while another is used.
    """
    room = LARGE_WEIGHTS if has_large_vmem() else WEIGHTS
    if many_tiles:
        whole = LARGE_STANDING if has_large_vmem() else WEIGHTS
        tk, tn = _blocks(K, N, itemsize, whole)
        if tk == K:
            return tk, tn, 1
    return *_blocks(K, N, itemsize, room // 2), 2


def gradient_blocks(K: int, N: int) -> tuple[int, int]:
    """Sides of a block of a weights' gradient."""
    most = LARGE_GRADIENT_BLOCK if has_large_vmem() else GRADIENT_BLOCK
    return _divisor(K, most[0]), _divisor(N, most[1])


def _blocks(K: int, N: int, itemsize: int, size: int) -> tuple[int, int]:
    """Sides of a block of weights of `size` bytes: all of K, where that leaves some 512 columns."""
    tk = _divisor(K, size // (4 * LANES * itemsize))
    return tk, _divisor(N, max(LANES, size // (tk * itemsize)))


def _divisor(size: int, most: int) -> int:
    """The largest divisor of `size` up to `most` that is whole lanes, else all of `size`."""
    whole = (d for d in range(most // LANES * LANES, 0, -LANES) if size % d == 0)
    return size if size <= most else next(whole, size)


def vmem_limit(blocks: int) -> int:
    """Vector memory to ask for: the blocks, and a quarter more for what the compiler adds."""
    asked = max(16 * 2**20, blocks + blocks // 4)
    return min(asked, LARGE_MEMORY) if has_large_vmem() else asked


def like(x: jax.Array, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """A result that differs between devices where `x` does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).mat)
