"""The release's folder -> our tree: order, names, shapes, exact values, refusals."""

import collections
import io
import json
import pickle
import shutil
import struct
import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from grok.checkpoint import release
from grok.checkpoint.release import read_quantized, read_release, scan_release, tensor_names
from grok.checkpoint.release_records import ArrayRecord
from grok.config import GrokConfig
from grok.errors import CheckpointError

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = ("pub_a", "pub_b")
SIZES = ("vocab_size", "num_layers", "embed_dim", "mlp_dim", "num_heads", "num_kv_heads")
SIZES += ("head_dim", "num_experts")
TINY = GrokConfig(**dict(zip(SIZES, (24, 12, 12, 20, 6, 2, 4, 3), strict=True)))
GROK_1 = GrokConfig(**dict(zip(SIZES, (131072, 64, 6144, 32768, 48, 8, 128, 8), strict=True)))
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
    "rms_norm_2/scale": "layers/pre_moe_norm/scale_D",
    "rms_norm_3/scale": "layers/post_moe_norm/scale_D",
    "router/w": "layers/moe/router_DE",
}
NEW_MODULE, OLD_MODULE = b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray"


class QuantizedWeight8bit:
    def __init__(self, weight: np.ndarray, scales: np.ndarray) -> None:
        self.weight, self.scales = weight, scales


QuantizedWeight8bit.__module__ = "__main__"  # where the release was pickled
QuantizedWeight8bit.__qualname__ = "QuantizedWeight8bit"


@pytest.fixture
def write(monkeypatch):
    """A function that writes an array, or weight and scales, to a file as the release does."""
    monkeypatch.setattr(
        sys.modules["__main__"], "QuantizedWeight8bit", QuantizedWeight8bit, raising=False
    )

    def write_file(path: Path, *arrays: np.ndarray) -> None:
        buffer = io.BytesIO()
        pickle.dump(arrays[0] if len(arrays) == 1 else QuantizedWeight8bit(*arrays), buffer, 4)
        data = buffer.getvalue()
        # NumPy 1, which the release was written by, has a shorter name for the module.
        assert data.count(NEW_MODULE) == 1
        (length,) = struct.unpack("<Q", data[3:11])
        data = data[:3] + struct.pack("<Q", length - 1) + data[11:]
        path.write_bytes(data.replace(NEW_MODULE, OLD_MODULE))

    return write_file


def golden_config(model: str) -> GrokConfig:
    sizes = json.loads((GOLDEN / model / "golden.json").read_text())["config"]
    keys = ("vocab_size", "num_layers", "emb_size", "ffn_size", "num_q_heads", "num_kv_heads")
    keys += ("key_size", "num_experts")
    return GrokConfig(**dict(zip(SIZES, (sizes[key] for key in keys), strict=True)))


def write_tiny(folder: Path, write, groups: int = 1) -> None:
    """A release of TINY in which every tensor holds the number of its layer, or -1."""
    folder.mkdir()
    shapes = release.tensor_shapes(TINY)
    for tensor in tensor_names(TINY.num_layers):
        shape = shapes[tensor.name]
        fill = -1 if tensor.layer is None else tensor.layer
        if shape.quantized:
            *lead, _, columns = shape.in_file
            scales = np.full((*lead, groups, columns), 0.5, ml_dtypes.bfloat16)
            write(folder / tensor.file, np.full(shape.in_file, 2 * fill, np.int8), scales)
        else:
            write(folder / tensor.file, np.full(shape.in_file, fill, np.float32))


def arrays_in(path: Path) -> list[np.ndarray]:
    """The arrays of a file by plain reads of its bytes at the recorded places."""
    record, data = release.read_record(path), path.read_bytes()
    parts = [record] if isinstance(record, ArrayRecord) else [record.weight, record.scales]
    return [
        np.frombuffer(data[p.offset : p.offset + p.nbytes], p.dtype).reshape(p.shape) for p in parts
    ]


@pytest.mark.parametrize("model", MODELS)
def test_what_is_read_pickles_back_to_the_same_file(tmp_path, write, model):
    """Python's own pickler, given what we read, writes the golden files byte for byte."""
    for path in sorted((GOLDEN / model / "ckpt-0").iterdir()):
        write(tmp_path / "again", *arrays_in(path))
        assert (tmp_path / "again").read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("model", MODELS)
def test_names_in_release_order(model):
    entries = json.loads((GOLDEN / model / "tensors.json").read_text())
    tensors = tensor_names(golden_config(model).num_layers)
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
    shapes = release.tensor_shapes(GROK_1)
    in_files = [shapes[tensor.name].in_file for tensor in tensor_names(64)[:14]]
    up, down, norm = (8, 6144, 32768), (8, 32768, 6144), (6144,)
    attention = [(6144, 1024), (6144, 6144), (6144, 6144), (6144, 1024)]
    layer = [up, down, up, *attention, *[norm] * 4, (6144, 8)]
    assert in_files == [(131072, 6144), norm, *layer]
    size = sum(np.prod(shapes[t.name].in_tree, dtype=np.int64) for t in tensor_names(64))
    assert size == GROK_1.num_parameters() == 315_684_820_992


@pytest.mark.parametrize("model", MODELS)
def test_tree_is_dequantised_exactly(model):
    config = golden_config(model)
    folder = GOLDEN / model / "ckpt-0"
    tree = read_release(folder, config)
    layers, d, f, e = config.num_layers, config.embed_dim, config.mlp_dim, config.num_experts
    n, k, h = config.num_heads, config.num_kv_heads, config.head_dim
    norms = [f"layers/{at}_{of}_norm/scale_D" for at in ("pre", "post") for of in ("attn", "moe")]
    assert {name: array.shape for name, array in tree.items()} == {
        "embed/table_VD": (config.vocab_size, d),
        "final_norm/scale_D": (d,),
        **dict.fromkeys(norms, (layers, d)),
        "layers/attention/w_query_DNH": (layers, d, n, h),
        "layers/attention/w_key_DKH": (layers, d, k, h),
        "layers/attention/w_value_DKH": (layers, d, k, h),
        "layers/attention/w_out_NHD": (layers, n, h, d),
        "layers/moe/router_DE": (layers, d, e),
        "layers/moe/w_gate_EDF": (layers, e, d, f),
        "layers/moe/w_up_EDF": (layers, e, d, f),
        "layers/moe/w_down_EFD": (layers, e, f, d),
    }
    groups = set()
    for tensor in tensor_names(layers):
        exact, *scales = (array.astype(np.float64) for array in arrays_in(folder / tensor.file))
        if scales:
            groups.add(scales[0].shape[-2])
            exact *= np.repeat(scales[0], exact.shape[-2] // scales[0].shape[-2], axis=-2)
        whole = tree[tensor.name]
        ours = whole if tensor.layer is None else whole[tensor.layer]
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours.astype(np.float64).ravel(), exact.ravel())
    assert groups == {1, 2 if model == "pub_a" else 8}


def test_query_columns_are_heads_first():
    tree = read_release(GOLDEN / "pub_a/ckpt-0", golden_config("pub_a"))
    values, scales = read_quantized(GOLDEN / "pub_a/ckpt-0/tensor00007_000")
    fifth = slice(5 * 8, 6 * 8)  # the columns of head 5; head_dim is 8
    exact = values[:, fifth].astype(np.float32) * scales[:, fifth].astype(np.float32)
    np.testing.assert_array_equal(tree["layers/attention/w_query_DNH"][0, :, 5], exact)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_twelve_layers_come_out_in_numeric_order(tmp_path, write, groups):
    write_tiny(tmp_path / "ckpt-0", write, groups)
    tree = read_release(tmp_path / "ckpt-0", TINY)
    for name, array in tree.items():
        numbers = array.reshape(12, -1).T if name.startswith("layers/") else array
        assert (numbers == (range(12) if name.startswith("layers/") else -1)).all(), name


def test_quantised_tensor_as_it_is():
    path = GOLDEN / "pub_b/ckpt-0/tensor00003_000"
    for ours, stored in zip(read_quantized(path), arrays_in(path), strict=True):
        np.testing.assert_array_equal(ours, stored, strict=True)
        assert ours.flags.aligned
    with pytest.raises(CheckpointError, match=r"tensor00001_000: holds float32 \(96,\), not a qu"):
        read_quantized(GOLDEN / "pub_b/ckpt-0/tensor00001_000")


def test_peak_memory_is_the_tree_and_little_more(tmp_path, write):
    write_tiny(tmp_path / "ckpt-0", write)
    config = GrokConfig(**{**vars(TINY), "num_layers": 1, "mlp_dim": 40_000})
    for tensor in tensor_names(12)[14:]:
        (tmp_path / "ckpt-0" / tensor.file).unlink()
    for index, shape in ((2, (3, 12, 40_000)), (3, (3, 40_000, 12)), (4, (3, 12, 40_000))):
        scales = np.ones((shape[0], 1, shape[2]), ml_dtypes.bfloat16)
        write(tmp_path / "ckpt-0" / f"tensor{index:05d}_000", np.ones(shape, np.int8), scales)
    tracemalloc.start()
    tree = read_release(tmp_path / "ckpt-0", config)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = sum(array.nbytes for array in tree.values())
    assert size > 17_000_000
    assert peak < 1.1 * size


@pytest.fixture
def folder(tmp_path):
    """A copy of pub_a that a test may damage."""
    return Path(shutil.copytree(GOLDEN / "pub_a/ckpt-0", tmp_path / "ckpt-0"))


def refusal(folder: Path, monkeypatch, **changes) -> str:
    """The message of read_release, which must come before any array is read."""
    monkeypatch.setattr(release, "_map", lambda *_: pytest.fail("an array was read"))
    config = GrokConfig(**{**vars(golden_config("pub_a")), **changes})
    with pytest.raises(CheckpointError) as error:
        read_release(folder, config)
    return str(error.value)


FILES_OF_3 = "a release of 3 layers has 38 files, tensor00000_000 to tensor00037_000, and no others"


def test_missing_extra_and_misnamed_files(folder, monkeypatch):
    (folder / "tensor00038_000").touch()
    wrong = refusal(folder, monkeypatch)
    assert wrong == f"{folder}/tensor00038_000: does not belong here; {FILES_OF_3}."
    (folder / "tensor00038_000").unlink()
    (folder / "tensor00020_000").rename(folder / "tensor20")
    wrong = refusal(folder, monkeypatch)
    assert wrong == f"{folder}/tensor00020_000: is missing; tensor20 is here instead; {FILES_OF_3}."
    (folder / "tensor00030_000").unlink()
    (folder / "tensor20").unlink()
    wrong = refusal(folder, monkeypatch)
    assert wrong == f"{folder}/tensor00020_000: is missing, and 1 more; {FILES_OF_3}."
    assert "none: cannot be read: No such file" in refusal(folder / "none", monkeypatch)


@pytest.mark.parametrize(
    ("changes", "file", "right"),
    [
        ({"num_layers": 2}, "tensor00026_000", "a release of 2 layers has 26 files"),
        ({"num_layers": 4}, "tensor00038_000", "tensor00000_000 to tensor00049_000"),
        ({"vocab_size": 500}, "tensor00000_000", "should be float32 (500, 64)"),
        ({"embed_dim": 32}, "tensor00000_000", "should be float32 (512, 32)"),
        ({"mlp_dim": 300}, "tensor00002_000", "should be quantised int8 (8, 64, 300)"),
        ({"num_heads": 4}, "tensor00006_000", "should be quantised int8 (32, 64)"),
        ({"num_kv_heads": 4}, "tensor00005_000", "should be quantised int8 (64, 32)"),
        ({"num_experts": 4}, "tensor00002_000", "should be quantised int8 (4, 64, 344)"),
    ],
)
def test_other_models_are_refused(folder, monkeypatch, changes, file, right):
    message = refusal(folder, monkeypatch, **changes)
    assert message.startswith(f"{folder}/{file}: ")
    assert right in message


def test_wrong_kinds_and_damage_are_refused(folder, monkeypatch, write):
    last = folder / "tensor00037_000"  # the router, read after everything else
    write(last, np.zeros((64, 8), np.int8))
    assert "router/w is int8 (64, 8); for this model's" in refusal(folder, monkeypatch)
    write(last, np.zeros((64, 8), np.int8), np.ones((1, 8), ml_dtypes.bfloat16))
    message = refusal(folder, monkeypatch)
    assert "is quantised int8 (64, 8); for this model's config it should be float32" in message
    write(last, np.zeros((64, 8), np.float32))
    last.write_bytes(last.read_bytes()[:-1000])
    assert f"{last}: is cut short" in refusal(folder, monkeypatch)


def test_hidden_files_are_passed_over(folder):
    (folder / ".DS_Store").touch()
    assert len(scan_release(folder, golden_config("pub_a"))) == 38


def test_a_file_that_shrinks_while_it_is_read(folder, monkeypatch):
    found = scan_release(folder, golden_config("pub_a"))
    (folder / "tensor00000_000").write_bytes(b"")
    monkeypatch.setattr(release, "scan_release", lambda *_: found)
    with pytest.raises(CheckpointError, match="tensor00000_000: cannot be read"):
        read_release(folder, golden_config("pub_a"))
