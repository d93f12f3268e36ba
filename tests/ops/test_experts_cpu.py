"""Products with a matrix read where it lies, against those with an array of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grok.ops.moe.cpu import ExpertSlice, matvec_in_place
from grok.ops.moe.experts_xla import experts_xla
from grok.ops.moe.tiling import MAX_MATVEC_ROWS, serving_tile_rows
from grok.ops.weights.layer_slice import LayerSlice
from grok.ops.weights.quantized import QuantizedArray, dequantize, quantize

L, E, D, F, M, C = 3, 4, 12, 42, 5, 2
RANDOM = np.random.default_rng(0)


def matrices(kind: str, rows: int, columns: int):
    """Experts' matrices of layer 2 among others, and the same as an array of their own."""
    w = RANDOM.standard_normal((L, E, rows, columns)).astype(np.float32)
    if kind in ("int8", "int4"):
        values, scales = quantize(w, 3, dtype=jnp.dtype(kind))
        dense = dequantize(values, scales, np.float32)[2]
        return QuantizedArray(jnp.asarray(values), jnp.asarray(scales), layer=2), dense
    w = w.astype(kind)
    return LayerSlice(jnp.asarray(w), 2), w[2].astype(np.float32)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_the_product_is_that_of_the_matrix_taken_out(kind):
    stack, dense = matrices(kind, D, F)
    x_MD = RANDOM.standard_normal((M, D)).astype(np.float32 if kind[:3] == "int" else kind)
    multiply = jax.jit(lambda x, stack, e: matvec_in_place(ExpertSlice(stack, e), x))
    actual = np.asarray(multiply(x_MD, stack, 3))
    expected = x_MD.astype(np.float32) @ dense[3]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
    # Each row has the bits that it has with other neighbours.
    np.testing.assert_array_equal(np.asarray(multiply(x_MD[::-1], stack, 3))[::-1], actual)


@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
def test_experts_of_a_layer_among_others_are_those_of_the_layer(kind):
    pairs = [matrices(kind, *shape) for shape in ((D, F), (D, F), (F, D))]
    x_RD = RANDOM.standard_normal((M, D)).astype(np.float32)
    topk_weights_RC = RANDOM.uniform(size=(M, C)).astype(np.float32)
    expert_ids_RC = np.stack([RANDOM.permutation(E)[:C] for _ in range(M)]).astype(np.int32)
    tile = serving_tile_rows(M, C, E)
    assert tile <= MAX_MATVEC_ROWS
    run = jax.jit(experts_xla, static_argnums=6)
    stacks, dense = zip(*pairs, strict=True)
    actual = run(x_RD, topk_weights_RC, expert_ids_RC, *stacks, tile)
    expected = run(x_RD, topk_weights_RC, expert_ids_RC, *dense, 8)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * abs(expected).max())


@pytest.mark.parametrize(
    ("rows", "chosen", "experts", "tile"),
    [(1, 2, 8, 1), (3, 2, 8, 2), (8, 2, 8, 4), (32, 2, 8, 8), (256, 2, 8, 32), (2, 2, 2, 2)],
)
def test_tiles_of_few_rows_are_twice_a_fair_share(rows, chosen, experts, tile):
    assert serving_tile_rows(rows, chosen, experts) == tile
