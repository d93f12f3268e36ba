"""Export to a Hugging Face folder: exact, in files of bounded size, restartable, and documented."""

import dataclasses
import fcntl
import hashlib
import json
import re
import shutil
import tracemalloc
import typing
from collections import namedtuple
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
from click.testing import CliRunner

from grok.cli.export import export
from grok.config import AttentionConfig, ModelConfig, MoEConfig
from grok.config.load import flatten, from_dict, load_config, nest, to_dict
from grok.config.schema import schema
from grok.errors import CheckpointError, ConfigError
from grok.model.params import num_parameters
from grok.ops.weights.quantized import dequantize
from grok.weights.cast import converted
from grok.weights.huggingface.adapters import BY_NAME
from grok.weights.huggingface.adapters.grok_1 import GROK_1
from grok.weights.huggingface.export import export_huggingface
from grok.weights.huggingface.shards import DTYPES, SHARD_BYTES, index_data, plan
from grok.weights.huggingface.source import HuggingFaceSource
from grok.weights.source import Source
from grok.weights.transpose import strips
from grok.weights.xai.source import ReleaseSource
from tests.fixtures.models import replace_keys
from tests.fixtures.random_weights import RandomSource
from tests.model import golden

INDEX, UNFINISHED = "model.safetensors.index.json", "unfinished-export.json"
TINY = ModelConfig(
    vocab_size=64,
    num_layers=2,
    embed_dim=16,
    moe=MoEConfig(dim=32, num_experts=4),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4),
)


def release(name: str) -> ReleaseSource:
    return ReleaseSource(golden.FOLDER / name / "ckpt-0", golden.config(name, "bfloat16"))


def assert_equal(a: Source, b: Source) -> None:
    assert a.tensors == b.tensors
    for name, spec in a.tensors.items():
        assert a.read(name, spec.full_part).tobytes() == b.read(name, spec.full_part).tobytes(), (
            name
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", golden.NAMES)
def test_release_to_hugging_face_and_back(tmp_path, name, dtype):
    source = release(name)
    done = export_huggingface(source, tmp_path / "hf", dtype)
    back = HuggingFaceSource(tmp_path / "hf")
    assert_equal(back, converted(source, dtype))
    assert back.config == source.config
    total = (num_parameters(source.config) + np.prod(source.tensors["embed/table_VD"].shape)) * (
        DTYPES[dtype].itemsize
    )
    assert (done.nbytes, done.files, done.files_resumed) == (total, 1, 0)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_any_source_can_be_exported(tmp_path, dtype):
    """Here floats that were quantised, or rounded, on the way."""
    source = converted(RandomSource(TINY, dtype="float32"), dtype)
    export_huggingface(source, tmp_path / "hf", "float32")
    assert_equal(HuggingFaceSource(tmp_path / "hf"), converted(source, "float32"))


def test_exporting_an_export_gives_the_same_files(tmp_path):
    export_huggingface(release("pub_a"), tmp_path / "a", shard_bytes=400_000)
    export_huggingface(HuggingFaceSource(tmp_path / "a"), tmp_path / "b", shard_bytes=400_000)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {path.name for path in (tmp_path / "b").iterdir()}
    for name in names - {"README.md"}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_files_of_bounded_size_that_the_formats_library_opens(tmp_path):
    source, limit = release("pub_b"), 300_000
    done = export_huggingface(source, tmp_path, shard_bytes=limit)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) == done.files > 10
    assert files[0] == f"model-00001-of-000{len(files)}.safetensors"
    values: dict[str, np.ndarray] = {}
    for file in files:
        data = (tmp_path / file).read_bytes()
        assert limit / 3 < len(data) <= limit or file == files[-1]
        with safetensors.safe_open(tmp_path / file, "numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert {index["weight_map"][name] for name in opened.keys()} == {file}  # noqa: SIM118
        for name, tensor in safetensors.deserialize(data):
            assert tensor["dtype"] == "BF16"
            array = np.frombuffer(tensor["data"], ml_dtypes.bfloat16)
            values[name] = array.reshape(tensor["shape"])
    assert values.keys() == index["weight_map"].keys()
    assert len(values) == done.tensors
    total = sum(array.nbytes for array in values.values())
    assert index["metadata"]["total_size"] == total == done.nbytes

    ours = {
        name: converted(source, "bfloat16").read(name, spec.full_part)
        for name, spec in source.tensors.items()
    }
    table = values["model.embed_tokens.weight"]
    np.testing.assert_array_equal(table, ours["embed/table_VD"])
    np.testing.assert_array_equal(values["lm_head.weight"], table)
    gate = values["model.layers.1.moe_block.experts.5.linear.weight"]
    np.testing.assert_array_equal(gate, ours["layers/moe/w_gate_EDF"][1, 5].T)
    out = ours["layers/attention/w_out_NHD"][1]
    np.testing.assert_array_equal(
        values["model.layers.1.attn.o_proj.weight"], out.reshape(-1, out.shape[-1]).T
    )


def test_plan_of_the_real_model():
    config = load_config("grok-1").model
    shards = plan(GROK_1, config, "bfloat16", SHARD_BYTES)
    index = index_data(shards)
    # The table is there twice: 315,684,820,992 parameters and 131072 x 6144 more.
    assert index["metadata"]["total_size"] == 2 * (315_684_820_992 + 131_072 * 6144)
    assert len(index["weight_map"]) == 64 * (9 + 3 * 8) + 3
    assert max(shard.file_bytes for shard in shards) <= SHARD_BYTES
    # 11 experts' matrices of 402,653,184 bytes go into a file, 1536 of them are there.
    assert 128 <= len(shards) <= 145
    assert shards[0].offsets[0] == len(shards[0].header)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 7, 70])
def test_strips_are_the_transpose_of_the_dequantised_matrix(dtype, groups):
    rng = np.random.default_rng(0)
    values = rng.integers(-127, 128, (700, 513), np.int8)
    scales = rng.standard_normal((groups, 513)).astype(ml_dtypes.bfloat16)
    expected = dequantize(values, scales, DTYPES[dtype])
    exact = [strip.copy() for strip in strips(values, DTYPES[dtype], scales.astype(np.float32))]
    assert np.concatenate(exact).tobytes() == expected.T.tobytes()
    plain = [strip.copy() for strip in strips(expected, DTYPES[dtype])]
    assert np.concatenate(plain).tobytes() == expected.T.tobytes()


def test_memory_is_that_of_a_few_matrices(tmp_path):
    config = replace_keys(TINY, {"embed_dim": 64, "moe.dim": 8192, "moe.num_experts": 16})
    source = RandomSource(config)
    source.read("layers/moe/w_gate_EDF", (slice(0, 1), slice(0, 1), slice(0, 1), slice(0, 1)))
    tracemalloc.start()
    done = export_huggingface(source, tmp_path, "float32", shard_bytes=20_000_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Four matrices of 0.5 MB, a strip of at most 8 MB of float32 of each, and little more.
    assert done.nbytes > 200_000_000
    assert peak < 50_000_000


class Failing(Source):
    """A source that fails after some reads of experts."""

    def __init__(self, source: Source, reads: int):
        self._source, self.reads = source, reads
        self.format, self.path = source.format, source.path
        self.config, self.tensors = source.config, source.tensors

    def read(self, name, part):
        if "/moe/w_" in name:
            self.reads -= 1
            if self.reads < 0:
                raise CheckpointError("the disk went away.")
        return self._source.read(name, part)

    def read_scales(self, name, part):
        return self._source.read_scales(name, part)


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_interrupted_export_goes_on(tmp_path):
    source, whole, folder = release("pub_a"), tmp_path / "whole", tmp_path / "hf"
    export_huggingface(source, whole, shard_bytes=400_000)

    with pytest.raises(CheckpointError, match="the disk went away"):
        export_huggingface(Failing(source, 40), folder, shard_bytes=400_000)
    finished = {path: path.stat() for path in folder.glob("*.safetensors")}
    shards = plan(GROK_1, source.config, "bfloat16", 400_000)
    unfinished = [shard for shard in shards if folder / shard.file not in finished]
    assert 2 <= len(finished) < len(list(whole.glob("*.safetensors")))
    assert not listing(folder) & {INDEX, "config.json"}
    with pytest.raises(CheckpointError, match="is an unfinished export; the same `grok export hf`"):
        HuggingFaceSource(folder)

    calls: list[tuple[str, int, int]] = []
    done = export_huggingface(
        source, folder, shard_bytes=400_000, on_progress=lambda *call: calls.append(call)
    )
    assert done.files_resumed == len(finished)
    for path, before in finished.items():
        now = path.stat()
        assert (now.st_ino, now.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert calls[0] == ("", done.nbytes - done.written, done.nbytes)
    assert [count for _, count, _ in calls] == sorted(count for _, count, _ in calls)
    assert calls[-1][1:] == (done.nbytes, done.nbytes)
    assert {name for name, *_ in calls[1:]} == {
        tensor.name for shard in unfinished for tensor in shard.tensors
    }
    assert done.written == sum(shard.data_bytes for shard in unfinished)
    assert listing(folder) == listing(whole)
    for path in whole.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_a_kill_before_the_first_file_or_after_the_last(tmp_path):
    source = RandomSource(TINY)
    export_huggingface(source, tmp_path / "hf")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    with pytest.raises(CheckpointError):
        export_huggingface(Failing(source, 4), tmp_path / "cut")
    claim = (tmp_path / "cut" / UNFINISHED).read_text()
    for text in ("", claim[:30], claim):
        (tmp_path / "cut" / UNFINISHED).write_text(text)
        export_huggingface(source, tmp_path / "cut")
        assert {path.name: path.read_bytes() for path in (tmp_path / "cut").iterdir()} == whole


def refusal(source: Source, folder, *args, **kwargs) -> str:
    with pytest.raises(CheckpointError) as error:
        export_huggingface(source, folder, *args, **kwargs)
    return str(error.value)


def test_other_weights_and_settings_do_not_go_on(tmp_path):
    folder = tmp_path / "hf"
    refusal(Failing(RandomSource(TINY), 5), folder)
    begun = f"{folder}: has an unfinished job of other input or settings ("
    end = "); delete it, or name another folder."
    message = refusal(RandomSource(TINY, seed=1), folder)
    assert message.startswith(f"{begun}values was ") and message.endswith(end)
    source = RandomSource(TINY)
    message = refusal(source, folder, "float32")
    assert message == f'{begun}dtype was "bfloat16" and is "float32"{end}'
    message = refusal(source, folder, shard_bytes=10_000)
    assert message.startswith(f"{begun}files.model-0000") and message.endswith(end)
    for text in ("[]", "[]\n", "{}", "hello"):
        (folder / UNFINISHED).write_text(text)
        assert refusal(source, folder) == (
            f"{folder / UNFINISHED}: is no journal of grok; delete {folder}, or name another "
            "folder."
        )


def test_destinations_that_cannot_be(tmp_path, monkeypatch):
    source = RandomSource(TINY)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    assert refusal(source, tmp_path / "full") == (
        f"{tmp_path}/full: is not empty (it has notes.txt); name another folder."
    )
    assert refusal(source, "gs://bucket/grok") == (
        "gs://bucket/grok: the output goes to a local folder, which can then be copied, as by "
        "`gcloud storage cp --recursive`."
    )
    assert "notes.txt: cannot be read: Not a dir" in refusal(source, tmp_path / "full/notes.txt")
    (tmp_path / "busy").mkdir()
    with (tmp_path / "busy" / UNFINISHED).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert refusal(source, tmp_path / "busy") == (
            f"{tmp_path}/busy: another process is writing here; wait for its end."
        )
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(9999, 9999, 1234))
    assert refusal(source, tmp_path / "hf").endswith(
        "bytes will be written, and the disk has 1,234 free."
    )


def test_a_disk_that_fails_while_it_is_written(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "hf/model-00001"))

    monkeypatch.setattr("os.fsync", full)
    assert refusal(RandomSource(TINY), tmp_path / "hf") == (
        f"{tmp_path}/hf/model-00001: cannot be written: No space left on device. Finished "
        "pieces stay; the same command continues."
    )


def test_files_too_small_for_a_tensor(tmp_path):
    sentence = r"a file of 2,000 bytes is too small for model\.embed_tokens\.weight, which is not s"
    with pytest.raises(ConfigError, match=sentence):
        export_huggingface(RandomSource(TINY), tmp_path / "hf", shard_bytes=2000)
    assert not (tmp_path / "hf").exists()


def test_config_and_model_card(tmp_path):
    manifest = tmp_path / "sources.yaml"
    manifest.write_text("- books\n")
    source = release("pub_a")
    export_huggingface(
        source, tmp_path / "hf", base_weights="xai-org/grok-1", data_manifest=manifest
    )
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("grok-1", ["Grok1ModelForCausalLM"])
    assert config["torch_dtype"] == "bfloat16"
    assert config["embedding_multiplier_scale"] == source.config.embedding_multiplier

    card = (tmp_path / "hf/README.md").read_text()
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert {"license: apache-2.0", "base_model: xai-org/grok-1"} <= set(head.splitlines())
    assert "transformers has no code of the architecture" in body
    assert "vLLM has code of its own up to release 0.24" in body
    assert (config["router_logit_softcapping"], config["attn_logit_softcapping"]) == (0, 30)
    assert "https://huggingface.co/hpcai-tech/grok-1" in body
    assert "`modeling_grok1.py`" in body
    assert "## Base weights\n\nxai-org/grok-1\n\nThe matrices were int8" in body
    for key in ("hidden_size", "num_experts", "embedding_multiplier_scale", "max_attn_value"):
        assert f"| {key} | {config[key]} |" in body
    digest = hashlib.sha256(b"- books\n").hexdigest()
    assert f"(data_manifest.yaml) is the data manifest (8 bytes, SHA-256 `{digest}`)." in body
    assert (tmp_path / "hf/data_manifest.yaml").read_text() == "- books\n"
    assert "Apache-2.0" in body


def test_model_card_without_what_is_not_known(tmp_path):
    export_huggingface(RandomSource(TINY), tmp_path / "random")
    card = (tmp_path / "random/README.md").read_text()
    assert "exported from random weights of seed" in card
    assert "No data manifest came with this export." in card
    assert "base_model" not in card
    assert "the code must be changed" not in card
    export_huggingface(release("pub_b"), tmp_path / "release")
    card = (tmp_path / "release/README.md").read_text()
    assert "Not stated. They were exported from a folder in the release's format" in card
    odd = replace_keys(TINY, {"attention.head_dim": 8})
    export_huggingface(RandomSource(odd), tmp_path / "odd")
    assert "the code must be changed" in (tmp_path / "odd/README.md").read_text()


# Keys that change how a model is computed and not what.
RUNTIME = {"param_dtype", "embedding_dtype", "compute_dtype", "matmul_dtype", "remat"}
KEYS = schema(ModelConfig)
SECTIONS = {
    "mlp": {"dim": 8},
    "moe": {"dim": 8, "num_experts": 4},
    "attention.rope.scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_context_length": 64,
    },
}
# A model of each family, from one that all others are changes of.
DENSE = {
    "moe": None,
    "mlp": {"dim": 32, "activation": "silu"},
    "norm.sandwich": False,
    "tie_embeddings": False,
    "embedding_multiplier": 1.0,
    "logit_multiplier": 1.0,
    "attention.logit_softcap": None,
}
EXPERTS = {"dim": 32, "num_experts": 4, "activation": "silu", "normalize": True}
SANDWICH = {
    "mlp": {"dim": 32, "activation": "gelu"},
    "moe": {"dim": 32, "num_experts": 4, "activation": "gelu", "logit_softcap": 30.0},
    "tie_embeddings": False,
    "logit_softcap": 50.0,
    "attention.temperature_length": 24,
}
MODELS = {
    "grok-1": {},
    "grok-2": SANDWICH,
    "llama": DENSE,
    "mistral": DENSE | {"attention.window": 8},
    "mixtral": DENSE | {"mlp": None, "moe": EXPERTS},
}


def changed(config: ModelConfig, changes: dict[str, object]) -> ModelConfig:
    """`config` with other values of some keys, which may be sections."""
    values = dict(flatten(to_dict(config)))
    for key in changes:
        values = {k: v for k, v in values.items() if not f"{k}.".startswith(f"{key}.")}
    if "attention.head_dim" in changes:
        del values["attention.logit_scale"]  # its default follows
    return from_dict(nest(values | changes), config_type=ModelConfig)


def variants(config: ModelConfig, key: str) -> list:
    """Other values of a key than the model has, None where it may be null."""
    values = dict(flatten(dataclasses.asdict(config)))
    nullable = type(None) in typing.get_args(KEYS[key].type)
    if KEYS[key].section is not None:
        return [SECTIONS[key] if values.get(key, ...) is None else None] if nullable else []
    if key not in values:  # of a section that is null
        return []
    match values[key]:
        case bool(value):
            other: object = not value
        case int(value) | float(value):
            other = 2 * value
        case str(value):
            other = next(choice for choice in KEYS[key].choices if choice != value)
        case None:
            return [8]
        case _:
            pytest.fail(f"no other value of {key} is known")
    return [other, None] if nullable else [other]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("key", [key for key in KEYS if key not in RUNTIME])
def test_every_field_of_a_model_is_written_or_refused(family, key):
    adapter, model = BY_NAME[family], changed(TINY, MODELS[family])
    for value in variants(model, key):
        try:
            config = changed(model, {key: value})
        except ConfigError:
            continue  # no model at all
        message, data = "", {}
        try:
            data = adapter.config_data(config, "float32")
        except ConfigError as error:
            message = str(error)
        if message:
            assert re.match(rf"model\.{re.escape(key)}[.=]", message)
            assert f" has no place in a Hugging Face folder of {adapter.family}, which" in message
        else:
            assert adapter.read_config("config.json", json.loads(json.dumps(data))) == config


@pytest.mark.parametrize("key", ["norm.sandwich", "attention.logit_softcap"])
def test_fields_that_config_json_cannot_hold_are_refused(tmp_path, key):
    config = replace_keys(TINY, {key: variants(TINY, key)[-1]})
    sentence = rf"^model\.{key}=(false|null) has no place in a Hugging"
    with pytest.raises(ConfigError, match=sentence):
        GROK_1.config_data(config, "float32")
    with pytest.raises(ConfigError, match=sentence):
        export_huggingface(RandomSource(config), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_command(tmp_path):
    config = tmp_path / "run.yaml"
    model = golden.config("pub_a", "float32")
    config.write_text(
        json.dumps({"model": dataclasses.asdict(model), "data": {"sequence_length": 32}})
    )
    source = golden.FOLDER / "pub_a" / "ckpt-0"
    arguments = ["hf", str(source), str(tmp_path / "hf"), "--config", str(config)]
    result = CliRunner().invoke(export, [*arguments, "--shard-size", "1.5 MB"])
    assert result.exit_code == 0, result.output
    first, second, third = result.stdout.splitlines()
    assert first == "102 tensors, 3,367,552 bytes, in 3 files"
    assert second.startswith("3,367,552 bytes written in ")
    assert third == f"{tmp_path}/hf: complete; README.md says what can read it"
    assert_equal(HuggingFaceSource(tmp_path / "hf"), converted(release("pub_a"), "bfloat16"))
    result = CliRunner().invoke(export, [*arguments, "--shard-size", "5 hats"])
    assert "5 hats is no size such as 5GB or 500MB." in result.stderr
