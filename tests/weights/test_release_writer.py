"""Releases that we write: the bytes of Python's pickler, sizes and order of the real one."""

import dataclasses
import hashlib
import os

import ml_dtypes
import numpy as np
import pytest

from grok.config import AttentionConfig, ModelConfig, MoEConfig
from grok.config.load import load_config
from grok.errors import CheckpointError
from grok.model.params import param_specs
from grok.weights.cast import converted, release_groups
from grok.weights.source import blocks, part_shape
from grok.weights.xai.source import (
    ReleaseSource,
    file_shape,
    implied_config,
    tensor_names,
)
from tests.fixtures.model_weights import MATRICES, shapes_of
from tests.fixtures.pickles import pickled, pickled_weight
from tests.fixtures.random_weights import RandomSource
from tests.fixtures.release_layout import plain_layout, quantized_layout
from tests.fixtures.release_writer import file_sizes, write_release
from tests.model import golden

TINY = ModelConfig(
    vocab_size=50,
    num_layers=3,
    embed_dim=24,
    moe=MoEConfig(dim=40, num_experts=3),
    attention=AttentionConfig(num_heads=6, num_kv_heads=2, head_dim=8),
)
BFLOAT16 = ml_dtypes.bfloat16


def filled(layout, *arrays) -> bytes:
    left = iter(arrays)
    return b"".join(item if isinstance(item, bytes) else next(left).tobytes() for item in layout)


@pytest.mark.parametrize("size", [2, 63, 64, 255, 256, 16383, 16384, 16385, 70_000])
def test_plain_arrays_are_as_python_pickles_them(size):
    # Around each width of a number, and around 64 KiB, from which on a pickler frames otherwise.
    for shape in ((size,), (size, 1), (1, 1, size)):
        array = np.arange(size, dtype=np.float32).reshape(shape)
        assert filled(plain_layout(shape), array) == pickled(array)


@pytest.mark.parametrize("weight", [2, 255, 256, *range(65_220, 65_360), 65_535, 65_536, 70_000])
def test_quantised_weights_are_as_python_pickles_them(weight):
    for scales in (2, 128, 32_767, 32_768):
        arrays = np.ones((1, weight), np.int8), np.ones((1, scales), BFLOAT16)
        layout = quantized_layout(*(array.shape for array in arrays))
        assert filled(layout, *arrays) == pickled_weight(*arrays)


@pytest.mark.parametrize("name", golden.NAMES)
def test_the_golden_release_is_written_again_byte_for_byte(tmp_path, name):
    folder = golden.FOLDER / name / "ckpt-0"
    source = ReleaseSource(folder, golden.config(name, "float32"))
    write_release(source, tmp_path / "new/ckpt-0")
    theirs = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "new/ckpt-0").iterdir()} == theirs
    assert file_sizes(source.config, lambda param: source.tensors[param.name].groups) == [
        len(theirs[file]) for file in sorted(theirs)
    ]


def test_numbers_and_sizes_of_all_770_files():
    """The table of the release: size of each of a layer's twelve files, layers in string order."""
    sizes = file_sizes(load_config("grok-1").model)
    up, down, keys, norm = 1_611_137_347, 1_611_399_491, 6_293_814, 24_727
    layer = [up, down, up, keys, 37_847_359, 37_761_334, keys, norm, norm, norm, norm, 196_770]
    assert sizes == [131072 * 6144 * 4 + 165, norm, *layer * 64]
    assert len(sizes) == 770 and sum(sizes) == 318_239_886_140
    tensors = tensor_names(64)
    assert [tensor.file for tensor in tensors] == [f"tensor{i:05d}_000" for i in range(770)]
    assert [tensors[2 + 12 * i].layer for i in range(64)] == sorted(range(64), key=str)
    assert [tensors[i].layer for i in (13, 14, 26, 146, 758, 769)] == [0, 1, 10, 2, 9, 9]


def test_the_whole_release_as_files_with_holes(tmp_path):
    """All 770 files at full size, in which the arrays take no room on disk, opened as they are."""
    config = load_config("grok-1").model
    specs = param_specs(config)
    for tensor in tensor_names(64):
        shape = file_shape(specs[tensor.name])
        if specs[tensor.name].is_matmul:
            groups = release_groups(specs[tensor.name])
            layout = quantized_layout(shape, (*shape[:-2], groups, shape[-1]))
        else:
            layout = plain_layout(shape)
        with open(tmp_path / tensor.file, "wb") as file:
            for item in layout:
                if isinstance(item, bytes):
                    file.write(item)
                else:
                    file.seek(item, os.SEEK_CUR)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 318_239_886_140
    implied = implied_config(tmp_path)
    assert shapes_of(implied) == shapes_of(config)
    source = ReleaseSource(tmp_path, implied)
    groups = {name: spec.groups for name, spec in source.tensors.items() if spec.groups}
    assert groups == {name: release_groups(specs[name]) for name in MATRICES}
    assert {name for name, count in groups.items() if count == 8} == {
        "layers/attention/w_out_NHD",
        "layers/moe/w_down_EFD",
    }
    part = (slice(63, 64), slice(7, 8), slice(6143, 6144), slice(32766, 32768))
    assert source.read("layers/moe/w_gate_EDF", part).tolist() == [[[[0, 0]]]]


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_what_is_written_is_read(tmp_path, dtype):
    source = RandomSource(TINY, seed=3, dtype=dtype)
    write_release(source, tmp_path)
    read, written = ReleaseSource(tmp_path, TINY), converted(source, "int8")
    assert read.tensors == written.tensors
    for name, spec in written.tensors.items():
        ours, theirs = (one.read(name, spec.full_part) for one in (read, written))
        np.testing.assert_array_equal(ours, theirs, strict=True)
        if spec.groups:
            every = tuple(slice(0, size) for size in spec.scales_shape)
            ours, theirs = (one.read_scales(name, every) for one in (read, written))
            np.testing.assert_array_equal(ours, theirs, strict=True)


def test_only_a_new_folder_is_written(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(CheckpointError, match=f"{tmp_path}: has files already"):
        write_release(RandomSource(TINY), tmp_path)
    with pytest.raises(CheckpointError, match="mine: cannot be written: File exists"):
        write_release(RandomSource(TINY), tmp_path / "mine")


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_random_weights_are_the_same_in_any_part(dtype):
    source, rng = RandomSource(TINY, dtype=dtype), np.random.default_rng(0)
    for name, spec in source.tensors.items():
        whole = source.read(name, spec.full_part)
        assert (whole.dtype, whole.shape) == (spec.dtype, spec.shape)
        for _ in range(10):
            low = [int(rng.integers(size)) for size in spec.shape]
            part = tuple(
                slice(begin, int(rng.integers(begin, size)) + 1)
                for begin, size in zip(low, spec.shape, strict=True)
            )
            np.testing.assert_array_equal(source.read(name, part), whole[part], strict=True)


def test_random_weights_differ_by_seed_name_layer_and_expert():
    digests = set()
    for source in (RandomSource(TINY), RandomSource(TINY, seed=1)):
        for name, spec in source.tensors.items():
            for part in blocks(spec, spec.full_part):
                digests.add(hashlib.sha256(source.read(name, part).tobytes()).hexdigest())
    # In each of two: four attention matrices and 3x3 of experts' in each layer, and six others.
    assert len(digests) == 2 * (3 * (4 + 9) + 7)
    again = RandomSource(TINY).read("embed/table_VD", (slice(0, 50), slice(0, 24)))
    assert hashlib.sha256(again.tobytes()).hexdigest() in digests


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_random_weights_have_the_sizes_of_trained_ones(dtype):
    config = dataclasses.replace(
        TINY, embed_dim=256, moe=dataclasses.replace(TINY.moe, dim=1024), vocab_size=500
    )
    source = converted(RandomSource(config, dtype=dtype), "float32")
    for name, spec in source.tensors.items():
        values = source.read(name, spec.full_part)
        if name.endswith("norm/scale_D"):
            assert 0.9 < values.mean() < 1.1 and values.std() < 0.2
        else:
            inputs = {"w_out": 48, "w_down": 1024}.get(name.split("/")[-1][:-4], 256)
            assert values.std() == pytest.approx(inputs**-0.5, rel=0.05), name


def test_groups_of_random_weights():
    groups = {name: spec.groups for name, spec in RandomSource(TINY).tensors.items() if spec.groups}
    assert groups == {
        **dict.fromkeys(
            (f"layers/attention/w_{of}H" for of in ("query_DN", "key_DK", "value_DK")), 1
        ),
        "layers/attention/w_out_NHD": 8,
        "layers/moe/w_gate_EDF": 1,
        "layers/moe/w_up_EDF": 1,
        "layers/moe/w_down_EFD": 8,
    }
    down = RandomSource(TINY, groups=lambda _: 7).tensors["layers/moe/w_down_EFD"]
    assert (down.groups, part_shape(down.full_part)[2]) == (5, 40)  # 7 does not divide 40
