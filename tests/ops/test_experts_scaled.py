"""The experts in 8 bits: kernels, interpreted, against the same in plain XLA, and both against the
reference in floats.

Letters: R rows, C chosen experts of a row, D embed, F mlp, E experts.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from grok.ops.moe.experts_scaled import Options, experts_scaled, quantize_rows
from grok.ops.moe.tiling import MlpSplits
from grok.ops.scaled import FORMATS, group_columns, quantize
from tests.fixtures.prove import in_suite
from tests.ops.test_experts_xla import R, arrays, routing, run_reference, value_and_gradients

RACES = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
# Norm of a difference over the norm. An element in the 8 bits of e4m3 has 3 behind the point, of
# e5m2 2, and an int8 of a row of 8 to 12 normal numbers some 6: each rounds by a part of
# 1 / sqrt(12) of its last, and each result stands behind two to six of them.
ERRORS = {"int8": 0.03, "float8": 0.12}


class Local:
    """Matrices that one device has."""

    def __call__(self, shards):
        return list(shards)

    def quantized(self, shards, dims, dtype):
        scaled = [quantize(w, dim, dtype) for w, dim in zip(shards, dims, strict=True)]
        return [
            s._replace(scales=s.scales.squeeze(dim)) for s, dim in zip(scaled, dims, strict=True)
        ]


def run(matmul_dtype: str, interpret=None, column_major=False):
    """Values and gradients, one half of the width after the other in the backward pass."""
    options = Options(matmul_dtype, MlpSplits(1, 2), "gelu_tanh", column_major, interpret)

    def experts(x_RD, topk_weights_RC, expert_ids_RC, *shards):
        x = quantize_rows(x_RD, matmul_dtype)
        return experts_scaled(x, topk_weights_RC, expert_ids_RC, shards, Local(), options)

    return value_and_gradients(experts)


def differences(actual: dict, expected: dict) -> dict[str, float]:
    """Norms of the differences, relative."""
    norm = functools.partial(np.linalg.norm, axis=None)
    return {
        name: float(norm(np.asarray(actual[name], np.float64) - right) / norm(np.float64(right)))
        for name, right in expected.items()
    }


@pytest.mark.parametrize("kind", in_suite(["random", "empty first and last"], "random"))
@pytest.mark.parametrize("matmul_dtype", FORMATS)
def test_values_and_gradients_are_near_the_references(matmul_dtype, kind):
    ids = routing(kind)
    errors = differences(run(matmul_dtype)(arrays(R), ids), run_reference(arrays(R), ids))
    print(f"\n{matmul_dtype}: {errors}")
    assert max(errors.values()) < ERRORS[matmul_dtype]
    assert max(errors.values()) > 1e-3


@pytest.mark.prove
@pytest.mark.parametrize("matmul_dtype", FORMATS)
@pytest.mark.parametrize("column_major", [False, True])
def test_kernels_compute_the_same(matmul_dtype, column_major):
    ids = routing("random")
    actual = run(matmul_dtype, RACES, column_major)(arrays(R), ids)
    errors = differences(actual, run(matmul_dtype)(arrays(R), ids))
    # Sums in other orders; where one rounds to another 8-bit value, a last bit of one element.
    assert max(errors.values()) < 1e-3, errors


def test_a_row_of_zeros_and_one_that_is_not_finite():
    x = jnp.asarray([[0.0, 0.0], [1e-35, 0.0], [1.0, jnp.inf], [jnp.nan, 1.0]])
    for formats in FORMATS.values():
        for dtype in formats:
            values, scales = quantize(x, 1, dtype)
            back = values.astype(jnp.float32) * scales
            assert np.abs(back[:2]).max() < 1e-30
            assert not np.isfinite(np.asarray(back[2:])).all(axis=1).any()


@pytest.mark.parametrize(
    ("columns", "group"), [(4096, 1024), (1792, 896), (14336, 1024), (24, 24), (3000, 3000)]
)
def test_groups_are_the_largest_whole_lanes_up_to_1024(columns, group):
    assert group_columns(columns) == group
