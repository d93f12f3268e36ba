"""Weights converted while they are read: any part of a whole is the part of the whole."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from grok.config import AttentionConfig, ModelConfig, MoEConfig
from grok.errors import CheckpointError
from grok.ops.weights.quantized import dequantize, quantize
from grok.weights import cast
from grok.weights.cast import converted, per_channel
from grok.weights.source import TensorSpec
from tests.fixtures.array_source import ArraySource
from tests.fixtures.model_weights import MATRICES
from tests.fixtures.random_weights import RandomSource

# Heads have 6 rows and groups of w_out 9, so that groups begin and end inside heads.
CONFIG = ModelConfig(
    vocab_size=20,
    num_layers=3,
    embed_dim=24,
    moe=MoEConfig(dim=40, num_experts=2),
    attention=AttentionConfig(num_heads=12, num_kv_heads=4, head_dim=6),
)
GROUPS = {"layers/attention/w_out_NHD": 8, "layers/moe/w_down_EFD": 8, "layers/moe/w_up_EDF": 3}
BF16, INT4 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.int4)
FROM = ("int8", "float32", "bfloat16", "float16")
TO = ("int8", "bfloat16", "float32")


@pytest.fixture
def small_groups(monkeypatch):
    """Groups of 8 rows in int4, so that matrices have several."""
    monkeypatch.setattr(cast, "INT4_GROUP", 8)


def groups_of(spec) -> int:
    return GROUPS.get(spec.name, 1)


def source_of(dtype: str) -> ArraySource:
    random = RandomSource(CONFIG, dtype="int8" if dtype == "int8" else "float32", groups=groups_of)
    source = ArraySource.copy(random)
    if dtype != "int8":
        kind = BF16 if dtype == "bfloat16" else np.dtype(dtype)
        source.values = {name: array.astype(kind) for name, array in source.values.items()}
    return source


def random_part(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[slice, ...]:
    part = []
    for size in shape:
        start = int(rng.integers(size))
        stop = int(rng.integers(start + 1, size + 1))
        part.append(slice(0, size) if rng.random() < 0.3 else slice(start, stop))
    return tuple(part)


def whole_scales(spec: TensorSpec) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in spec.scales_shape)


@pytest.mark.parametrize("to", ["int4_all", "int4", *TO])
@pytest.mark.parametrize("kind", FROM)
def test_any_part_is_the_part_of_the_whole(kind, to, small_groups):
    source = converted(source_of(kind), to, groups_of)
    rng = np.random.default_rng(5)
    for name, spec in source.tensors.items():
        whole = source.read(name, spec.full_part)
        assert (whole.dtype, whole.shape) == (spec.dtype, spec.shape)
        for _ in range(20):
            part = random_part(rng, spec.shape)
            np.testing.assert_array_equal(source.read(name, part), whole[part])
        if spec.groups is None:
            continue
        scales = source.read_scales(name, whole_scales(spec))
        assert (scales.dtype, scales.shape) == (BF16, spec.scales_shape)
        for _ in range(20):
            part = random_part(rng, spec.scales_shape)
            np.testing.assert_array_equal(source.read_scales(name, part), scales[part])


@pytest.mark.parametrize("to", TO)
@pytest.mark.parametrize("kind", FROM)
def test_the_whole_by_definition(kind, to):
    given = source_of(kind)
    source = converted(given, to, groups_of)
    assert source.dtype == to
    for name, spec in source.tensors.items():
        values = given.values[name]
        found = source.read(name, spec.full_part)
        matrix = MATRICES.get(name)
        if to == "int8" and matrix and kind != "int8":
            dims = matrix.contract_dims, matrix.output_dims
            expected, scales = quantize(values, GROUPS.get(name, 1), *dims)
            np.testing.assert_array_equal(source.read_scales(name, whole_scales(spec)), scales)
        elif kind == "int8" and matrix and to != "int8":
            dims = matrix.contract_dims, matrix.output_dims
            expected = dequantize(values, given.scales[name], spec.dtype, *dims)
        elif to == "int8":
            expected = values if matrix else values.astype(np.float32)
        else:
            expected = values.astype(BF16 if to == "bfloat16" else to)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("to", ["int4", "int4_all"])
@pytest.mark.parametrize("kind", FROM)
def test_int4_is_for_the_matrices_of_the_experts_or_for_all(kind, to, small_groups):
    stored = source_of(kind)
    source, floats = (converted(stored, dtype, groups_of) for dtype in (to, "float32"))
    assert source.dtype == to
    for name, spec in source.tensors.items():
        if name not in MATRICES:
            assert (spec.dtype, spec.groups) == (np.float32, None)
            continue
        dims = MATRICES[name].contract_dims, MATRICES[name].output_dims
        is_int4 = to == "int4_all" or "/moe/" in name
        groups = spec.param.contract_size // 8 if is_int4 else GROUPS.get(name, 1)
        assert (spec.dtype, spec.groups) == (INT4 if is_int4 else np.int8, groups)
        w = floats.read(name, spec.full_part)
        values, scales = quantize(w, groups, *dims, spec.dtype)
        if kind == "int8" and not is_int4:  # they stay, bit for bit
            values, scales = stored.values[name], stored.scales[name]
        np.testing.assert_array_equal(source.read(name, spec.full_part), values)
        np.testing.assert_array_equal(source.read_scales(name, whole_scales(spec)), scales)
        assert spec.nbytes == w.size // (2 if is_int4 else 1) + 2 * scales.size
    again = converted(converted(source, "float32"), to)
    for name, spec in source.tensors.items():
        if spec.dtype == INT4:
            values = source.read(name, spec.full_part)
            np.testing.assert_array_equal(again.read(name, spec.full_part), values)


@pytest.mark.parametrize("dtype", ["int8", "int4", "int4_all"])
def test_nothing_is_done_where_nothing_is_asked(dtype):
    source = converted(source_of("int8"), dtype)
    assert converted(source, dtype) is source


def test_groups_of_the_release_where_they_divide_the_rows():
    config = dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, dim=36))
    spec = converted(RandomSource(config, dtype="float32"), "int8").tensors
    assert spec["layers/attention/w_out_NHD"].groups == 8
    assert spec["layers/moe/w_down_EFD"].groups == 6
    assert spec["layers/moe/w_gate_EDF"].groups == 1
    spec = converted(RandomSource(config, dtype="float32"), "int8", per_channel).tensors
    assert {spec[name].groups for name in MATRICES} == {1}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_quantised(value):
    given = source_of("float32")
    given.values["layers/moe/w_up_EDF"][2, 1, 7, 11] = value
    source = converted(given, "int8")
    part = (slice(2, 3), slice(1, 2), slice(0, 24), slice(0, 40))
    sentence = "arrays: layers/moe/w_up_EDF has values that are not finite."
    with pytest.raises(CheckpointError) as refused:
        source.read("layers/moe/w_up_EDF", part)
    assert str(refused.value) == sentence
    with pytest.raises(CheckpointError, match="layers/moe/w_up_EDF"):
        source.read_scales("layers/moe/w_up_EDF", part)
    # The other layers are as good as before.
    source.read("layers/moe/w_up_EDF", (slice(0, 2), *part[1:]))
