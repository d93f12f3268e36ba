"""int8 and int4 with scales: bounded error, the release's numbers back, exact dequantising."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from grok.ops.weights.quantized import QuantizedArray, dequantize, quantize
from grok.weights.xai.source import ReleaseSource
from tests.model import golden

BF16 = np.dtype(ml_dtypes.bfloat16)
INT8, INT4 = np.dtype(np.int8), np.dtype(ml_dtypes.int4)
LARGEST = {INT8: 127, INT4: 7}
each_type = pytest.mark.parametrize("integer", [INT8, INT4], ids=str)
# Shape, row axes, column axes, groups. A head of w_out (N H D) has 6 rows.
KINDS = {
    "w_gate, per channel": ((3, 24, 10), 1, 1, 1),
    "w_down, grouped": ((3, 24, 10), 1, 1, 8),
    "one row a group": ((24, 10), 1, 1, 24),
    "w_query, two column axes": ((2, 24, 4, 6), 1, 2, 1),
    "w_out, whole heads in a group": ((2, 8, 6, 10), 2, 1, 4),
    "w_out, groups straddle heads": ((2, 8, 6, 10), 2, 1, 3),
    "w_out, groups end inside heads": ((2, 8, 6, 10), 2, 1, 16),
}
kinds = pytest.mark.parametrize(
    ("shape", "contract_dims", "output_dims", "groups"), KINDS.values(), ids=KINDS
)


def matrix(shape, seed=0) -> np.ndarray:
    """Values of many sizes: columns differ by powers of two."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * 2.0 ** rng.integers(-20, 20, shape[-1])
    return values.astype(np.float32)


def in_groups(array, groups, contract_dims, output_dims) -> np.ndarray:
    """(leading, group, row of the group, column), by plain counting."""
    lead = math.prod(array.shape[: array.ndim - contract_dims - output_dims])
    columns = math.prod(array.shape[array.ndim - output_dims :])
    return array.reshape(lead, groups, -1, columns)


@each_type
@kinds
def test_scales_and_values_by_definition(shape, contract_dims, output_dims, groups, integer):
    w, largest = matrix(shape), LARGEST[integer]
    values, scales = quantize(w, groups, contract_dims, output_dims, integer)
    assert (values.dtype, scales.dtype, values.shape) == (integer, BF16, shape)
    lead, columns = (
        shape[: len(shape) - contract_dims - output_dims],
        shape[len(shape) - output_dims :],
    )
    assert scales.shape == (*lead, groups, *columns)
    w_grouped = in_groups(w, groups, contract_dims, output_dims)
    values = in_groups(values, groups, contract_dims, output_dims)
    scales = scales.reshape(len(w_grouped), groups, -1)
    for i, g, column in np.ndindex(scales.shape):
        rows = w_grouped[i, g, :, column]
        scale = BF16.type(np.abs(rows).max() / np.float32(largest))
        assert scales[i, g, column] == scale
        expected = np.clip(np.rint(rows / np.float32(scale)), -largest, largest)
        np.testing.assert_array_equal(values[i, g, :, column].astype(np.float32), expected)


@each_type
@kinds
def test_error_is_at_most_half_a_scale(shape, contract_dims, output_dims, groups, integer):
    w = matrix(shape)
    values, scales = quantize(w, groups, contract_dims, output_dims, integer)
    error = in_groups(
        dequantize(values, scales, np.float64, contract_dims, output_dims) - w,
        groups,
        contract_dims,
        output_dims,
    )
    # A scale that was rounded down by at most 2^-9 puts the largest value a quarter of a step past
    # 127, so rounding to whole steps stays the larger error. The quotient is a float32.
    bound = scales.astype(np.float64).reshape(len(error), groups, 1, -1) * (0.5 + 128 * 2**-24)
    assert (np.abs(error) <= bound).all()


def test_dequantising_is_exact_in_float32():
    """Every int8 times every mantissa of a scale, and the scales of small and large weights."""
    values = np.arange(-127, 128, dtype=np.int8)[:, None].repeat(3 * 128, 1)
    mantissas = 1 + np.arange(128) / 128
    scales = np.outer([2.0**-40, 2.0**-9, 2.0**30], mantissas).reshape(1, -1).astype(BF16)
    exact = values.astype(np.float64) * scales.astype(np.float64)
    w = dequantize(values, scales, np.float32)
    assert w.dtype == np.float32
    np.testing.assert_array_equal(w, exact)
    np.testing.assert_array_equal(dequantize(values, scales, BF16), exact.astype(BF16))


@each_type
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16], ids=str)
def test_every_scale_comes_back(dtype, integer):
    """A column of all values, for each mantissa of a scale; columns of both signs."""
    largest = LARGEST[integer]
    values = np.arange(-largest, largest + 1).astype(integer)[:, None].repeat(3 * 128, 1)
    mantissas = 1 + np.arange(128) / 128
    scales = np.outer([2.0**-40, 2.0**-9, 2.0**30], mantissas).reshape(1, -1).astype(BF16)
    again = quantize(dequantize(values, scales, dtype), 1, dtype=integer)
    np.testing.assert_array_equal(again[0], values)
    np.testing.assert_array_equal(again[1], scales)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16], ids=str)
@pytest.mark.parametrize("name", golden.NAMES)
def test_requantising_a_release_gives_it_back(name, dtype):
    source = ReleaseSource(golden.FOLDER / name / "ckpt-0", golden.config(name, "float32"))
    for tensor, spec in source.tensors.items():
        if not spec.param.is_matmul:
            continue
        dims = spec.param.contract_dims, spec.param.output_dims
        values = source.read(tensor, spec.full_part)
        scales = source.read_scales(tensor, tuple(slice(0, n) for n in spec.scales_shape))
        again = quantize(dequantize(values, scales, dtype, *dims), spec.groups, *dims)
        before, after = (in_groups(v, spec.groups, *dims) for v in (values, again[0]))
        full = np.abs(before.astype(int)).max(axis=2) == 127
        assert full.any()
        lead = len(before)
        np.testing.assert_array_equal(
            again[1].reshape(lead, spec.groups, -1)[full],
            scales.reshape(lead, spec.groups, -1)[full],
        )
        rows = np.broadcast_to(full[:, :, None, :], before.shape)
        np.testing.assert_array_equal(after[rows], before[rows])


@each_type
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16], ids=str)
@pytest.mark.parametrize("kind", ["w_down, grouped", "w_out, groups straddle heads"])
def test_jax_gives_the_bits_of_numpy(kind, dtype, jit, integer):
    shape, contract_dims, output_dims, groups = KINDS[kind]
    w = matrix(shape).astype(dtype)
    run = functools.partial(
        quantize,
        num_scale_groups=groups,
        contract_dims=contract_dims,
        output_dims=output_dims,
        dtype=integer,
    )
    values, scales = run(w)
    ours, own_scales = (jax.jit(run) if jit else run)(jnp.asarray(w))
    assert isinstance(ours, jax.Array)
    np.testing.assert_array_equal(np.asarray(ours), values)
    np.testing.assert_array_equal(np.asarray(own_scales), scales)
    back = functools.partial(
        dequantize, dtype=dtype, contract_dims=contract_dims, output_dims=output_dims
    )
    np.testing.assert_array_equal(
        np.asarray((jax.jit(back) if jit else back)(ours, own_scales)), back(values, scales)
    )


def test_zeros_stay_zeros():
    w = matrix((2, 12, 5))
    w[0, 4:8, 3] = 0
    values, scales = quantize(w, 3)
    assert scales[0, 1, 3] == 0
    assert np.count_nonzero(scales == 0) == 1
    np.testing.assert_array_equal(dequantize(values, scales, np.float32)[0, 4:8, 3], 0)


def test_a_part_of_a_quantized_array_dequantises_alike():
    w = matrix((3, 8, 6, 10))
    values, scales = (jnp.asarray(a) for a in quantize(w, 16, 2, 1))
    array = QuantizedArray(values, scales, 2, 1)
    assert array.shape == w.shape
    np.testing.assert_array_equal(
        array[1].dequantize(jnp.float32), array.dequantize(jnp.float32)[1]
    )


def test_rows_that_groups_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="48 rows cannot be split into 5 equal groups"):
        quantize(matrix((8, 6, 10)), 5, contract_dims=2)
