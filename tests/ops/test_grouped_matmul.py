"""The TPU kernels, interpreted with a look-out for races, against their plain references.

Letters: R rows, C chosen experts of a row, E experts, M rows of a tile, P slots, K contracted
axis, N columns.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from grok import hardware
from grok.ops.mlp import gated_activation
from grok.ops.moe import grouped_matmul as kernels
from grok.ops.moe import tiling
from grok.ops.moe.grouped_hidden import grouped_hidden, grouped_hidden_reference
from grok.ops.moe.routing import group_by_expert, tile_schedule
from grok.ops.moe.tiling import KernelBytes
from grok.ops.weights.quantized import QuantizedArray, quantize

R, C, E, K, N, M = 40, 2, 4, 32, 24, 48
WIDTHS = 1024, 2048, 4096, 8192, 14336, 16384, 32768  # of an expert on one chip
RACES = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")

# Sums of at most 96 products, in another order: some units of 2^-24 = 6e-8.
TOLERANCE = 2e-6

TILES = [[1, 2, 0, 1], [0, 0, 5, 0], [0, 1, 0, 0]]  # of each expert; 5 at most
each_routing = pytest.mark.parametrize("tiles", TILES, ids=str)


@pytest.fixture(scope="module")
def arrays() -> tuple[jax.Array, ...]:
    """x_PK, dy_PN, w_EKN for five tiles of 16 rows."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (80, K), (80, N), (E, K, N)
    return tuple(jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))


def assert_near(actual, expected, tiles) -> None:
    """Equal in the tiles that there are."""
    actual, expected = (
        np.asarray(actual)[: 16 * sum(tiles)],
        np.asarray(expected)[: 16 * sum(tiles)],
    )
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * abs(expected).max())


@functools.cache
def product(transposed: bool = False, pairs: int = 1):
    def run(x, w, tiles_E):
        w = jnp.swapaxes(w, 1, 2) if transposed else w
        return kernels.grouped_matmul(
            (x,) * pairs,
            (w,) * pairs,
            tiles_E,
            16,
            dtype=jnp.float32,
            transposed=transposed,
            interpret=RACES,
        )

    return jax.jit(run)


def reference(x, w, tiles) -> jax.Array:
    return kernels.grouped_matmul_reference(x, w, jnp.asarray(tiles, jnp.int32), 16)


@each_routing
def test_product(arrays, tiles):
    x, _, w = arrays
    actual = product()(x, w, jnp.asarray(tiles, jnp.int32))
    assert_near(actual, reference(x, w, tiles), tiles)
    assert np.isnan(np.asarray(actual)[16 * sum(tiles) :]).all()  # nothing is done there


def test_sum_of_two_products_with_transposed_matrices(arrays):
    x, _, w = arrays
    actual = product(True, 2)(x, w, jnp.asarray(TILES[0], jnp.int32))
    assert_near(actual, 2 * reference(x, w, TILES[0]), TILES[0])


@pytest.mark.parametrize("split", [False, True])
def test_sum_from_a_start_on(arrays, split, monkeypatch):
    """The matrices in one block or in several."""
    if split:
        monkeypatch.setattr(tiling, "_block_sides", lambda *_: (8, 12))
    x, start, w = arrays
    tiles_E = jnp.asarray(TILES[0], jnp.int32)
    actual = kernels.grouped_matmul(
        (x,), (w,), tiles_E, 16, dtype=jnp.float32, start=start, interpret=RACES
    )
    assert_near(actual, start + reference(x, w, TILES[0]), TILES[0])


def test_blocks_of_rows_and_columns_of_the_weights(arrays, monkeypatch):
    """A matrix too large for one block, as int8 with groups of rows and as floats."""
    monkeypatch.setattr(tiling, "_block_sides", lambda *_: (8, 12))
    x, _, w = arrays
    tiles_E = jnp.asarray(TILES[0], jnp.int32)
    run = functools.partial(
        kernels.grouped_matmul, tiles_E=tiles_E, tile=16, dtype=jnp.float32, interpret=RACES
    )
    assert_near(run((x,), (w,)), reference(x, w, TILES[0]), TILES[0])
    q = QuantizedArray(*quantize(w, 2))
    assert_near(run((x,), (q,)), reference(x, q, TILES[0]), TILES[0])


def test_int8_matrices_of_one_layer_of_several(arrays):
    x, _, w = arrays
    values, scales = quantize(w, 4)
    several = QuantizedArray(
        jnp.stack([0 * values, values]), jnp.stack([scales, scales]), layer=jnp.int32(1)
    )
    tiles_E = jnp.asarray(TILES[0], jnp.int32)
    actual = kernels.grouped_matmul(
        (x,), (several,), tiles_E, 16, dtype=jnp.float32, interpret=RACES
    )
    assert_near(actual, reference(x, QuantizedArray(values, scales), TILES[0]), TILES[0])


@pytest.mark.parametrize("split", [False, True])
@each_routing
def test_hidden_layer_in_one_kernel(arrays, tiles, split, monkeypatch):
    """With the products and without them, the matrices in one block or in several."""
    if split:
        monkeypatch.setattr(tiling, "_block_sides", lambda *_: (8, 12))
    x, _, w = arrays
    inputs = x, w, w[:, ::-1], jnp.asarray(tiles, jnp.int32), 16
    expected = grouped_hidden_reference(*inputs, activation=gated_activation)
    for products in (True, False):
        actual = grouped_hidden(
            *inputs, activation=gated_activation, keep_products=products, interpret=RACES
        )
        assert len(actual) == (3 if products else 1)
        for ours, right in zip(actual, expected, strict=False):
            assert_near(ours, right, tiles)


@each_routing
def test_weight_gradient_is_zero_for_experts_without_rows(arrays, tiles):
    x, dy, _ = arrays
    tiles_E = jnp.asarray(tiles, jnp.int32)
    actual = gradient(x, dy, tiles_E)
    expected = kernels.weight_gradient_reference(x, dy, tiles_E, 16)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * abs(expected).max())


@jax.jit
def gradient(x, dy, tiles_E):
    return kernels.grouped_weight_gradient(x, dy, tiles_E, 16, dtype=jnp.float32, interpret=RACES)


def test_slots_are_in_tiles_of_one_expert():
    rng = np.random.default_rng(1)
    for chosen in (np.argsort(rng.random((R, E)))[:, :C], np.tile([2, 0], (R, 1))):
        layout = group_by_expert(jnp.asarray(chosen, jnp.int32), E)
        assignment_P, slot_RC = np.asarray(layout.assignment_P), np.asarray(layout.slot_RC)
        tile = tiling.kernel_tile_rows(R, C, E)
        assert tile == M
        np.testing.assert_array_equal(assignment_P[slot_RC], np.arange(R * C).reshape(R, C))
        assert (assignment_P < R * C).sum() == R * C
        schedule = tile_schedule(layout.tiles_E, len(assignment_P) // tile)
        expert_of_slot = np.repeat(np.asarray(schedule.expert_I), tile)
        np.testing.assert_array_equal(expert_of_slot[slot_RC], chosen)
        assert slot_RC.max() < schedule.num_steps[0] * tile


@pytest.mark.parametrize(
    ("rows", "chosen", "experts", "tile"),
    [(1, 2, 8, 16), (64, 2, 8, 64), (300, 2, 8, 128), (8192, 2, 8, 256), (65536, 2, 8, 512)],
)
def test_tiles_are_an_eighth_of_a_fair_share_between_128_and_512(rows, chosen, experts, tile):
    assert tiling.kernel_tile_rows(rows, chosen, experts) == tile


def test_a_large_memory_has_wider_blocks_of_weights_and_lower_tiles(monkeypatch):
    """All rows are read again for each block of columns: a v6e has one block where others
    have four, and two buffers only where a block stays for few tiles."""
    # Half of the width that four chips share, two matrices in bfloat16.
    both = 256, 6144, 4096, KernelBytes(rows=2, weights=2 * 2, results=2, sums=8)
    assert tiling.weight_blocks(*both, many_tiles=True) == (6144, 1024, 1)
    monkeypatch.setattr(hardware, "device_kind", lambda: "TPU v6 lite")
    assert tiling.weight_blocks(*both, many_tiles=True) == (6144, 4096, 1)
    assert tiling.weight_blocks(*both, many_tiles=False) == (6144, 1024, 2)
    assert tiling.kernel_tile_rows(65536, 2, 8) == 256


def test_experts_are_split_as_often_as_their_width_allows(monkeypatch):
    """Those of Grok-1 over four and eight chips, of Mixtral 8x7B over eight; where HBM is scarce in
    four parts or two, and wide parts in the forward pass as well."""
    widths = (8192, 4096, 1792, 896)
    assert [tiling.mlp_splits(F, 128) for F in widths] == [(1, 2), (1, 2), (1, 2), (1, 1)]
    monkeypatch.setattr(hardware, "device_kind", lambda: "TPU v6 lite")
    assert [tiling.mlp_splits(F, 128) for F in widths] == [(4, 4), (2, 4), (1, 2), (1, 1)]


def test_blocks_of_the_widest_experts_leave_the_compiler_room(monkeypatch):
    """A down matrix of 14336 rows on one chip, 512 rows a tile: on a v5p the compiler takes 57.33
    MiB of its 64, of which the blocks are 45; smaller blocks ask for what they did before."""
    monkeypatch.setattr(hardware, "device_kind", lambda: "TPU v5")
    down = KernelBytes(rows=2, weights=2, results=2)
    block = tiling.weight_blocks(512, 14336, 4096, down, many_tiles=True)
    assert down.of_blocks(512, *block) == 45 * 2**20
    assert 57.33 * 2**20 < down.required(512, *block) < 59 * 2**20
    assert 57.33 * 2**20 < tiling.vmem_limit(45 * 2**20) < 64 * 2**20
    assert tiling.vmem_limit(40 * 2**20) == 50 * 2**20


@pytest.mark.parametrize("chip", hardware.CHIPS)
def test_blocks_of_any_width_fit_into_vector_memory(chip, monkeypatch):
    """By the arithmetic that benchmarks/kernel_sweep.py holds against the compiler's."""
    monkeypatch.setattr(hardware, "device_kind", lambda: hardware.CHIPS[chip].kinds[0])
    hidden, down = KernelBytes(2, 4, 6, sums=8), KernelBytes(2, 2, 2)
    dx, int8 = KernelBytes(4, 4, 4), KernelBytes(2, 1, 2, sums=8, column=64 + 2 * 4096)
    for D, F in itertools.product((2048, 4096, 6144, 8192), WIDTHS):
        for rows, many_tiles in ((64, False), (8192, True), (65536, True)):
            M = tiling.kernel_tile_rows(rows, 2, 8)
            for size, K, N in ((hidden, D, F), (down, F, D), (dx, F, D), (int8, D, F)):
                block = tiling.weight_blocks(M, K, N, size, many_tiles)
                assert K % block[0] == 0
                assert N % block[1] == 0
                assert size.required(M, *block) <= tiling.max_vmem_limit()
            tk, tn = tiling.gradient_blocks(M, D, F, 4, 2)
            assert (D % tk, F % tn) == (0, 0)
            assert tk * tn * 12 + 2 * M * (tk + tn) * 2 <= tiling.max_vmem_limit()
