"""The release's folder as a source: order, names, shapes, exact values of any part."""

import collections
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from grok.config import ModelConfig
from grok.errors import CheckpointError
from grok.model.params import num_parameters, param_specs
from grok.weights.cast import converted
from grok.weights.source import blocks, scales_part
from grok.weights.xai import source as release
from grok.weights.xai.source import ReleaseSource, implied_config, tensor_names
from grok.weights.xai.unpickler import read_tensor
from tests.fixtures.models import model_config, replace_keys
from tests.fixtures.random_weights import RandomSource
from tests.fixtures.release_writer import write_release
from tests.model import golden

SIZES = ("vocab_size", "num_layers", "embed_dim", "moe.dim", "attention.num_heads")
SIZES += ("attention.num_kv_heads", "attention.head_dim", "moe.num_experts")
TINY = model_config(dict(zip(SIZES, (24, 12, 12, 20, 6, 2, 4, 3), strict=True)))
GROK_1 = model_config(dict(zip(SIZES, (131072, 64, 6144, 32768, 48, 8, 128, 8), strict=True)))
OUR_NAMES = {  # written out again, for a slip in one of the two lists to show
    "moe/linear/w": "layers/moe/w_gate_EDF",
    "moe/linear_v/w": "layers/moe/w_up_EDF",
    "moe/linear_1/w": "layers/moe/w_down_EFD",
    "multi_head_attention/query/w": "layers/attention/w_query_DNH",
    "multi_head_attention/key/w": "layers/attention/w_key_DKH",
    "multi_head_attention/value/w": "layers/attention/w_value_DKH",
    "multi_head_attention/linear/w": "layers/attention/w_out_NHD",
    "rms_norm/scale": "layers/pre_attn_norm/scale_D",
    "rms_norm_1/scale": "layers/post_attn_norm/scale_D",
    "rms_norm_2/scale": "layers/pre_ffn_norm/scale_D",
    "rms_norm_3/scale": "layers/post_ffn_norm/scale_D",
    "router/w": "layers/moe/router_DE",
}


def golden_config(name: str) -> ModelConfig:
    return golden.config(name, "float32")


def opened(name: str) -> ReleaseSource:
    return ReleaseSource(golden.FOLDER / name / "ckpt-0", golden_config(name))


def arrays_in(path: Path) -> list[np.ndarray]:
    """The arrays of a file by plain reads of its bytes at the recorded places."""
    record, data = read_tensor(path), path.read_bytes()
    parts = [part for part in (record.values, record.scales) if part]
    return [
        np.frombuffer(data[p.offset : p.offset + p.nbytes], p.dtype).reshape(p.shape) for p in parts
    ]


@pytest.mark.parametrize("name", golden.NAMES)
def test_names_in_release_order(name):
    entries = json.loads((golden.FOLDER / name / "tensors.json").read_text())
    tensors = tensor_names(golden_config(name).num_layers)
    assert [f"params/{t.release_name}" for t in tensors] == [e["name"] for e in entries]
    assert [f"ckpt-0/{t.file}" for t in tensors] == [e["file"] for e in entries]
    assert [t.name for t in tensors[:2]] == ["embed/table_VD", "final_norm/scale_D"]
    for tensor in tensors[2:]:
        layer, _, rest = tensor.release_name.removeprefix("transformer/decoder_layer_").partition(
            "/"
        )
        assert (tensor.name, tensor.layer) == (OUR_NAMES[rest], int(layer))


def test_layers_of_the_release_are_in_string_order():
    tensors = tensor_names(64)
    assert len(tensors) == 770
    assert tensors[-1].file == "tensor00769_000"
    assert [tensors[i].layer for i in (2, 13, 14, 26, 146, 758, 769)] == [0, 0, 1, 10, 2, 9, 9]
    layers = collections.Counter(t.layer for t in tensors)
    assert layers == {None: 2} | dict.fromkeys(range(64), 12)


def test_shapes_of_the_release():
    specs = param_specs(GROK_1)
    in_files = [release.file_shape(specs[tensor.name]) for tensor in tensor_names(64)[:14]]
    up, down, norm = (8, 6144, 32768), (8, 32768, 6144), (6144,)
    attention = [(6144, 1024), (6144, 6144), (6144, 6144), (6144, 1024)]
    layer = [up, down, up, *attention, *[norm] * 4, (6144, 8)]
    assert in_files == [(131072, 6144), norm, *layer]
    size = sum(np.prod(release.file_shape(specs[t.name]), dtype=np.int64) for t in tensor_names(64))
    assert size == num_parameters(GROK_1) == 315_684_820_992


@pytest.mark.parametrize("name", golden.NAMES)
def test_values_and_scales_are_those_of_the_files(name):
    source = opened(name)
    assert (source.format, source.dtype) == ("xai", "int8")
    groups = set()
    for tensor in tensor_names(source.config.num_layers):
        spec = source.tensors[tensor.name]
        values, *scales = arrays_in(golden.FOLDER / name / "ckpt-0" / tensor.file)
        whole = source.read(tensor.name, spec.full_part)
        ours = whole if tensor.layer is None else whole[tensor.layer]
        assert (ours.dtype, whole.shape) == (spec.dtype, spec.shape)
        np.testing.assert_array_equal(ours.reshape(values.shape), values, strict=True)
        assert [spec.groups or 0] == [s.shape[-2] for s in scales] or not (scales or spec.groups)
        if spec.groups:
            groups.add(spec.groups)
            every = tuple(slice(0, size) for size in spec.scales_shape)
            ours = source.read_scales(tensor.name, every)[tensor.layer]
            np.testing.assert_array_equal(ours.reshape(scales[0].shape), scales[0], strict=True)
    assert groups == {1, 2 if name == "pub_a" else 8}


@pytest.mark.parametrize("name", golden.NAMES)
def test_dequantised_exactly(name):
    source = opened(name)
    exact = converted(source, "float32")
    for tensor in tensor_names(source.config.num_layers):
        values, *scales = (
            array.astype(np.float64)
            for array in arrays_in(golden.FOLDER / name / "ckpt-0" / tensor.file)
        )
        if scales:
            values *= np.repeat(scales[0], values.shape[-2] // scales[0].shape[-2], axis=-2)
        whole = exact.read(tensor.name, exact.tensors[tensor.name].full_part)
        ours = whole if tensor.layer is None else whole[tensor.layer]
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours.astype(np.float64).ravel(), values.ravel())


def test_query_columns_are_heads_first():
    source = opened("pub_a")
    values, scales = arrays_in(golden.FOLDER / "pub_a/ckpt-0/tensor00007_000")
    fifth = slice(5 * 8, 6 * 8)  # the columns of head 5; head_dim is 8
    part = (slice(0, 1), slice(0, 64), slice(5, 6), slice(0, 8))
    ours = source.read("layers/attention/w_query_DNH", part)[0, :, 0]
    np.testing.assert_array_equal(ours, values[:, fifth], strict=True)
    part = (slice(0, 1), slice(0, 1), slice(5, 6), slice(0, 8))
    ours = source.read_scales("layers/attention/w_query_DNH", part)[0, :, 0]
    np.testing.assert_array_equal(ours, scales[:, fifth], strict=True)


@pytest.fixture(scope="module")
def twelve(tmp_path_factory) -> tuple[RandomSource, ReleaseSource]:
    """Random weights of twelve layers, and the release that they were written as."""
    folder = tmp_path_factory.mktemp("twelve")
    source = RandomSource(TINY)
    write_release(source, folder)
    return source, ReleaseSource(folder, TINY)


def test_twelve_layers_come_out_in_numeric_order(twelve):
    written, read = twelve
    for tensor in tensor_names(12):
        path = Path(read._stored[tensor.name, tensor.layer][0])
        assert path.name == tensor.file
        if tensor.layer is not None:
            part = (slice(tensor.layer, tensor.layer + 1), *read.tensors[tensor.name].full_part[1:])
            values = written.read(tensor.name, part)
            np.testing.assert_array_equal(read.read(tensor.name, part), values, strict=True)
            np.testing.assert_array_equal(arrays_in(path)[0].ravel(), values.ravel())


def test_any_part_is_that_part_of_the_whole(twelve):
    _, source = twelve
    rng = np.random.default_rng(1)
    for name, spec in source.tensors.items():
        reads = [(source.read, spec.shape)]
        if spec.groups:
            reads.append((source.read_scales, spec.scales_shape))
        for read, shape in reads:
            whole = read(name, tuple(slice(0, size) for size in shape))
            for _ in range(5):
                low = [int(rng.integers(size)) for size in shape]
                part = tuple(
                    slice(begin, int(rng.integers(begin, size)) + 1)
                    for begin, size in zip(low, shape, strict=True)
                )
                np.testing.assert_array_equal(read(name, part), whole[part], strict=True)


def test_blocks_cover_a_tensor_with_its_scales(twelve):
    written, read = twelve
    for name, spec in read.tensors.items():
        for part in blocks(spec, spec.full_part):
            np.testing.assert_array_equal(read.read(name, part), written.read(name, part))
            if spec.groups:
                of = scales_part(spec, part)
                np.testing.assert_array_equal(
                    read.read_scales(name, of), written.read_scales(name, of)
                )


def test_opening_reads_no_arrays_and_reading_copies_once(tmp_path):
    config = replace_keys(TINY, {"num_layers": 2, "moe.dim": 40_000})
    write_release(RandomSource(config), tmp_path)
    tracemalloc.start()
    source = ReleaseSource(tmp_path, config)
    _, opening = tracemalloc.get_traced_memory()
    values = source.read("layers/moe/w_gate_EDF", source.tensors["layers/moe/w_gate_EDF"].full_part)
    _, reading = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert values.nbytes == 2 * 3 * 12 * 40_000
    assert opening < 500_000
    assert reading < values.nbytes + 500_000


def test_hidden_files_are_passed_over(tmp_path):
    write_release(RandomSource(TINY), tmp_path)
    (tmp_path / ".DS_Store").touch()
    assert ReleaseSource(str(tmp_path) + "/", TINY).tensors


def test_a_config_implied_by_files(tmp_path):
    sizes = dict(zip(SIZES, (40, 11, 16, 24, 4, 2, 128, 3), strict=True))
    config = model_config(sizes | {"moe.num_selected": 2})
    write_release(RandomSource(config), tmp_path)
    assert implied_config(tmp_path) == config
    (tmp_path / "tensor00100_000").unlink()
    with pytest.raises(CheckpointError) as error:
        implied_config(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}/tensor00100_000: is missing; a release has 2 files and 12 for each layer, "
        "so 134 and not 133 here."
    )
    with pytest.raises(CheckpointError, match="queries are 64 wide and keys 16, no multiples"):
        implied_config(golden.FOLDER / "pub_a/ckpt-0")


def test_an_implied_config_that_cannot_be(tmp_path):
    config = model_config(dict(zip(SIZES, (40, 1, 16, 24, 3, 3, 128, 3), strict=True)))
    write_release(RandomSource(config), tmp_path)
    # Two key heads in the place of three, which do not divide three query heads.
    narrow = replace_keys(config, {"attention.num_heads": 2, "attention.num_kv_heads": 2})
    write_release(RandomSource(narrow), tmp_path / "narrow")
    (tmp_path / "narrow/tensor00005_000").rename(tmp_path / "tensor00005_000")
    with pytest.raises(CheckpointError, match=r"shapes of no model: .*num_kv_heads=2"):
        implied_config(tmp_path)


def test_a_config_of_other_weights_is_refused():
    folder = golden.FOLDER / "pub_a" / "ckpt-0"
    config = replace_keys(golden.config("pub_a", "float32"), {"norm.sandwich": False})
    with pytest.raises(CheckpointError, match=r"only one of them has layers/post_attn"):
        ReleaseSource(folder, config)
