"""int4 on disk: imported from every format, two values to a byte, and written for other programs.

Letters: E experts, D embed, F mlp.
"""

import dataclasses
import json
import math
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

import grok
from grok.cli.main import main
from grok.config import AttentionConfig, DataConfig, ModelConfig, MoEConfig, NormConfig, RunConfig
from grok.config.model import MLPConfig
from grok.errors import CheckpointError, ConfigError
from grok.model.build import to_arrays
from grok.weights import cast
from grok.weights.cast import converted
from grok.weights.detect import open_source
from grok.weights.gguf.export import export_gguf
from grok.weights.huggingface import compressed
from grok.weights.huggingface.compressed import Int4Source
from grok.weights.huggingface.export import export_huggingface
from grok.weights.huggingface.push import is_exported
from grok.weights.huggingface.source import HuggingFaceSource
from grok.weights.importing.importer import import_weights
from grok.weights.int4 import INT4, pack, unpack
from grok.weights.load import put_on_mesh
from grok.weights.orbax.source import OrbaxSource
from grok.weights.read_plan import MeshProcesses
from grok.weights.source import Source, part_shape
from grok.weights.tools.inspection import inspect
from grok.weights.tools.verify import compare
from tests.fixtures.families import FOLDER
from tests.fixtures.models import replace_keys
from tests.fixtures.random_weights import RandomSource
from tests.model import golden

# Of Llama's form, and of Grok-1's; groups of 128 rows divide both widths.
LLAMA = ModelConfig(
    vocab_size=64,
    num_layers=2,
    embed_dim=128,
    tie_embeddings=False,
    embedding_multiplier=1.0,
    logit_multiplier=1.0,
    norm=NormConfig(sandwich=False),
    mlp=MLPConfig(dim=256),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32, logit_softcap=None),
)
GROK = ModelConfig(
    vocab_size=64,
    num_layers=2,
    embed_dim=128,
    moe=MoEConfig(dim=256, num_experts=2),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32),
)
WIDE = ("layers/moe/w_gate_EDF", "layers/moe/w_up_EDF", "layers/moe/w_down_EFD")


def run_of(config: ModelConfig) -> RunConfig:
    return RunConfig(model=config, data=DataConfig(sequence_length=32))


def everything(source: Source, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    spec = source.tensors[name]
    values = source.read(name, spec.full_part)
    if spec.groups is None:
        return values, None
    return values, source.read_scales(name, tuple(slice(0, n) for n in spec.scales_shape))


def same_int4(a: Source, b: Source) -> None:
    for name in WIDE if a.config.moe else [n for n in a.tensors if "/mlp/" in n]:
        assert a.tensors[name] == b.tensors[name]
        for x, y in zip(everything(a, name), everything(b, name), strict=True):
            assert (x.dtype, x.tobytes()) == (y.dtype, y.tobytes()), name


def test_two_to_a_byte():
    values = np.arange(-8, 8).astype(INT4)
    assert pack(values)[0] == 0x98 and pack(values).nbytes == 8
    assert unpack(pack(values)).tobytes() == values.tobytes()
    eights = compressed.pack(values.astype(np.int8).reshape(2, 8))
    assert eights.view(np.uint32).tolist() == [[0x76543210], [0xFEDCBA98]]
    assert compressed.unpack(eights).tobytes() == values.tobytes()


@pytest.fixture(scope="module")
def release_int4(tmp_path_factory) -> Path:
    """A golden release as an import in int4 stores it."""
    folder = tmp_path_factory.mktemp("int4") / "run"
    done = CliRunner().invoke(
        main, ["import", "xai", str(golden.FOLDER / "pub_a/ckpt-0"), str(folder), "--dtype", "int4",
               "--config", str(config_file(folder.parent))],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "rounding to int4, or int8 of attention, against" in done.output
    assert "layers/moe/w_gate_EDF" in done.output and "w_query" not in done.output
    return folder


def config_file(folder: Path) -> Path:
    from grok.config.text import to_yaml

    (folder / "model.yaml").write_text(to_yaml(run_of(golden.config("pub_a", "float32"))))
    return folder / "model.yaml"


def test_an_import_takes_half_a_byte_a_value(release_int4):
    source = OrbaxSource(release_int4)
    assert (source.dtype, source.config.param_dtype) == ("int4", "int4")
    for name in WIDE:
        folder = release_int4 / f"checkpoints/0/model/{name.replace('/', '.')}.values"
        stored = sum(file.stat().st_size for file in folder.iterdir())
        size = math.prod(source.tensors[name].shape) // 2
        # Besides: the format's checksums and offsets, 20 bytes a chunk, and a list of the array.
        assert size < stored < 1.35 * size
    report = inspect(release_int4)
    assert (report.dtype, report.problems) == ("int4", ())
    release = golden_release()
    for name in WIDE:
        errors = json.loads((release_int4 / "checkpoints/0/meta/metadata").read_text())["import"]
        # Of int8 values, normal in 64 or 172 rows a group: of steps of 1/7 of the largest.
        assert 0.08 < errors["rounding_errors"][name]["relative_rms"] < 0.14
    verified = CliRunner().invoke(main, ["verify", str(release_int4)])
    assert verified.exit_code == 0, verified.output
    attention = [n for n in source.tensors if "/attention/" in n]
    comparisons = {c.spec.name: c for c in compare(source, release)}
    assert all(comparisons[name].equal for name in attention)
    assert comparisons[WIDE[0]].method.words == "int4 with int8: dequantised to float32"


def golden_release() -> Source:
    from grok.weights.xai.source import ReleaseSource

    return ReleaseSource(golden.FOLDER / "pub_a/ckpt-0", golden.config("pub_a", "float32"))


def test_requantising_changes_nothing(release_int4):
    stored = OrbaxSource(release_int4)
    for dtype in ("float32", "bfloat16"):
        again = converted(converted(stored, dtype), "int4")
        for name in WIDE:
            x, y = everything(stored, name), everything(again, name)
            assert all(a.tobytes() == b.tobytes() for a, b in zip(x, y, strict=True)), dtype
    same_int4(converted(golden_release(), "int4"), stored)


@pytest.mark.parametrize("sizes", [None, (1, 4, 2), (2, 2, 2)], ids=str)
def test_an_import_is_loaded_as_the_release_is(release_int4, sizes, monkeypatch):
    """By devices of four processes too, and with every value read once."""
    mesh = sizes and grok.make_mesh(*sizes)
    config = golden.config("pub_a", "float32")
    expected = to_arrays(grok.load(golden.FOLDER / "pub_a/ckpt-0", config, mesh, "int4"))
    source, read = OrbaxSource(release_int4), dict.fromkeys(WIDE, 0)

    def counting(name, part, original=source.read):
        if name in read:
            read[name] += math.prod(part_shape(part))
        return original(name, part)

    monkeypatch.setattr(source, "read", counting)
    if mesh is not None:
        shape = mesh.devices.shape
        processes = MeshProcesses(dict(mesh.shape), np.arange(8).reshape(shape) // 2)
        monkeypatch.setattr("grok.weights.transfer.MeshProcesses", lambda *_: processes)
    for name, array in to_arrays(put_on_mesh(source, mesh)).items():
        assert array.sharding == expected[name].sharding
        np.testing.assert_array_equal(np.asarray(array), np.asarray(expected[name]), name)
    assert read == {name: math.prod(source.tensors[name].shape) for name in WIDE}


def test_logits_of_the_release_in_int4(release_int4):
    """What float32 weights rounded likewise by NumPy give; nearer to the release than random."""
    tokens = golden.arrays("pub_a")["tokens"]
    config = dataclasses.replace(golden.config("pub_a", "float32"), param_dtype="int4")
    logits = np.asarray(grok.load(release_int4, config)(tokens, segment_ids=tokens > 0))
    exact = golden.arrays("pub_a", "exact")["logits_exact"]
    real = tokens > 0
    error = golden.rms(logits[real], exact[real]) / exact[real].std()
    print(f"\nint4 of the release: {error:.3f} r.m.s. of the logits' deviation")
    assert error < 0.5
    rounded = converted(converted(golden_release(), "int4"), "float32")
    plain = np.asarray(put_on_mesh(rounded)(tokens, segment_ids=tokens > 0))
    np.testing.assert_allclose(logits[real], plain[real], atol=2e-5 * np.abs(plain).max())


def test_odd_columns_are_refused(tmp_path):
    config = replace_keys(GROK, {"moe.dim": 33})
    with pytest.raises(CheckpointError, match=r"has 33 columns, .*; int8 would work\.$"):
        import_weights(converted(RandomSource(config), "int4"), tmp_path / "run", run_of(config))


@pytest.mark.parametrize("config", [LLAMA, GROK], ids=["llama", "grok-1"])
def test_attention_in_int4_too(tmp_path, config):
    """The same values in a checkpoint and in a folder for vLLM, which name no type; and logits of
    floats that are rounded likewise."""
    source = converted(RandomSource(config, dtype="float32"), "int4_all")
    export_huggingface(source, tmp_path / "hf", "int4_all")
    import_weights(source, tmp_path / "run", run_of(config))
    folder, stored = HuggingFaceSource(tmp_path / "hf"), OrbaxSource(tmp_path / "run")
    matrices = [name for name, spec in source.tensors.items() if spec.groups]
    assert len(matrices) == 7 and QUERY in matrices
    for name in matrices:
        for other in (folder, stored):
            assert other.tensors[name] == source.tensors[name]
            for x, y in zip(everything(other, name), everything(source, name), strict=True):
                assert x.tobytes() == y.tobytes(), (other, name)
    assert folder.dtype == stored.dtype == "int4_all"
    assert [inspect(path).dtype for path in (tmp_path / "hf", tmp_path / "run")] == ["int4_all"] * 2
    said = json.loads((tmp_path / "hf/config.json").read_text())["quantization_config"]["ignore"]
    assert "lm_head" in said and not any("attn" in pattern for pattern in said)
    assert "attention, MLP and experts are int4" in (tmp_path / "hf/README.md").read_text()
    tokens = np.arange(8)[None]
    for path in (tmp_path / "hf", tmp_path / "run"):
        model = grok.load(path)
        assert model.config.param_dtype == "int4_all"
        rounded = put_on_mesh(converted(open_source(path), "float32"))
        logits, plain = np.asarray(model(tokens)), np.asarray(rounded(tokens))
        np.testing.assert_allclose(logits, plain, atol=0.03 * np.abs(plain).max())


@pytest.mark.parametrize("config", [LLAMA, GROK], ids=["llama", "grok-1"])
def test_compressed_tensors_and_back(tmp_path, config):
    source = RandomSource(config, dtype="float32")
    done = export_huggingface(source, tmp_path / "hf", "int4", shard_bytes=120_000)
    back = HuggingFaceSource(tmp_path / "hf")
    assert done.files > 2 and back.dtype == "int4"
    same_int4(converted(source, "int4"), back)
    name = "layers/attention/w_out_NHD"
    expected = everything(source, name)[0].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(everything(back, name)[0], expected)
    assert is_exported(source, tmp_path / "hf", "int4")
    # The same from an import of it, which has attention in int8.
    import_weights(converted(back, "int4", measure=True), tmp_path / "run", run_of(config))
    stored = OrbaxSource(tmp_path / "run")
    same_int4(back, stored)
    assert stored.tensors[name].dtype == np.int8
    export_huggingface(stored, tmp_path / "again", "int4")
    same_int4(back, HuggingFaceSource(tmp_path / "again"))
    logits = [np.asarray(grok.load(tmp_path / p)(np.arange(8)[None])) for p in ("hf", "run")]
    assert golden.rms(*logits) < 0.02


def test_what_config_json_says(tmp_path):
    export_huggingface(RandomSource(LLAMA, dtype="float32"), tmp_path, "int4")
    stated = json.loads((tmp_path / "config.json").read_text())
    assert stated["torch_dtype"] == "bfloat16"
    quantization = stated["quantization_config"]
    assert (quantization["quant_method"], quantization["format"]) == (
        "compressed-tensors",
        "pack-quantized",
    )
    weights = quantization["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (4, 128, True)
    assert quantization["ignore"][:2] == ["lm_head", r"re:model\.layers\.\d+\.self_attn\.q_proj$"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    module = "model.layers.1.mlp.down_proj"
    assert {f"{module}.weight_{part}" for part in ("packed", "scale", "shape")} <= index.keys()
    for change, message in (
        ({"format": "int-quantized"}, "format is 'int-quantized'"),
        ({"config_groups": {"a": {"weights": weights | {"num_bits": 8}}}}, "weights are"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    ):
        changed = stated | {"quantization_config": quantization | change}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(
            CheckpointError, match=rf"config\.json: quantization_config .*{message}"
        ):
            HuggingFaceSource(tmp_path)


def test_groups_that_such_a_folder_has_no_place_for(tmp_path, monkeypatch):
    odd = replace_keys(LLAMA, {"mlp.dim": 192})
    with pytest.raises(ConfigError, match=r"w_down_FD has 192 rows in 1 groups.*128 rows share"):
        export_huggingface(RandomSource(odd, dtype="float32"), tmp_path, "int4")
    with pytest.raises(ConfigError, match=r"split over ranks.*--dtype bfloat16 would work"):
        export_huggingface(HuggingFaceSource(FOLDER / "grok2"), tmp_path, "int4")
    monkeypatch.setattr(cast, "INT4_GROUP", 64)
    fine = converted(RandomSource(LLAMA, dtype="float32"), "int4")
    with pytest.raises(ConfigError, match="in 2 groups"):
        Int4Source(fine, "int4")


@pytest.mark.parametrize("stored", ["int4", "float32"])
def test_q4_0(tmp_path, stored):
    """int4 values and scales are the blocks' own; floats are rounded as llama.cpp's tools do."""
    source = converted(RandomSource(GROK, dtype="float32"), stored)
    export_gguf(source, tmp_path / "a.gguf", "q4_0")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    kinds = {name: tensors[name].tensor_type.name for name in (
        "blk.0.ffn_up_exps.weight", "blk.0.attn_q.weight", "token_embd.weight",
        "blk.0.ffn_gate_inp.weight",
    )}  # fmt: skip
    assert list(kinds.values()) == ["Q4_0", "Q8_0", "Q8_0", "F32"]
    floats = converted(source, "float32")
    for theirs, ours in (("blk.1.ffn_up_exps.weight", WIDE[1]), ("blk.1.attn_q.weight", QUERY)):
        tensor, w = tensors[theirs], everything(floats, ours)[0][1]
        w = w.reshape(128, -1).T if ours == QUERY else w.transpose(0, 2, 1)
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if stored == "int4":
            np.testing.assert_array_equal(values, w)
        else:
            assert np.sqrt(np.mean((values - w) ** 2) / np.mean(w**2)) < 0.1


QUERY = "layers/attention/w_query_DNH"
