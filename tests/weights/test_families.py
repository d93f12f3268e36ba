"""Releases of other families: every golden set read, imported, exported again and inspected."""

import dataclasses
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import grok as package
from grok.cli.main import main
from grok.config import ModelConfig
from grok.config.load import load_config
from grok.errors import CheckpointError, ConfigError
from grok.model.build import to_arrays
from grok.model.params import num_parameters, param_specs
from grok.ops.weights.quantized import dequantize
from grok.weights.cast import converted
from grok.weights.detect import open_source
from grok.weights.huggingface.adapters import ADAPTERS, adapter_for_export
from grok.weights.huggingface.export import export_huggingface
from grok.weights.huggingface.source import HuggingFaceSource
from grok.weights.tools.inspection import preset_of
from tests.fixtures.families import FAMILIES, FOLDER, RELEASED_CONFIGS, released, tree
from tests.fixtures.model_weights import shapes_of
from tests.fixtures.models import replace_keys
from tests.fixtures.random_weights import RandomSource

ADAPTER_NAMES = {
    "grok2": "grok-2",
    "llama2": "llama",
    "llama31": "llama",
    "mistral": "mistral",
    "mixtral": "mixtral",
}
PARAMETERS = {
    "grok2": 1_038_464,
    "llama2": 186_944,
    "llama31": 244_288,
    "mistral": 250_432,
    "mixtral": 715_328,
}
RELEASE_DTYPES = {"llama2": "float16"}
INDEX = "model.safetensors.index.json"


def grok(*arguments: object) -> str:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def assert_holds(source, expected: dict[str, np.ndarray]) -> None:
    assert list(source.tensors) == list(shapes_of(source.config))
    assert source.tensors.keys() == expected.keys()
    for name, spec in source.tensors.items():
        values = source.read(name, spec.full_part)
        assert (spec.shape, spec.dtype) == (values.shape, values.dtype)
        assert values.shape == expected[name].shape, name
        assert values.dtype == expected[name].dtype, name
        assert values.tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_release(family):
    source = HuggingFaceSource(FOLDER / family)
    assert source.adapter.name == ADAPTER_NAMES[family]
    assert num_parameters(source.config) == PARAMETERS[family]
    assert source.dtype == RELEASE_DTYPES.get(family, "bfloat16")
    assert_holds(source, tree(family, source.config))


@pytest.mark.parametrize("family", ["grok2", "mixtral"])
def test_parts_across_ranks_and_experts(family):
    source = HuggingFaceSource(FOLDER / family)
    expected = tree(family, source.config)
    rng = np.random.default_rng(1)
    for name, spec in source.tensors.items():
        for _ in range(20):
            ends = [sorted(rng.choice(size + 1, 2, replace=False)) for size in spec.shape]
            part = tuple(slice(int(start), int(stop)) for start, stop in ends)
            np.testing.assert_array_equal(source.read(name, part), expected[name][part])


@pytest.mark.parametrize("family", FAMILIES)
def test_import_export_and_verify(tmp_path, family):
    release = FOLDER / family
    dtype = RELEASE_DTYPES.get(family, "bfloat16")
    grok("import", "hf", release, tmp_path / "run", "--dtype", "float32")
    imported = open_source(tmp_path / "run")
    expected = tree(family, imported.config)
    assert_holds(imported, {name: array.astype(np.float32) for name, array in expected.items()})
    assert grok("verify", tmp_path / "run").endswith("equal\n")
    assert grok("verify", tmp_path / "run", release).endswith("equal\n")

    output = grok("export", "hf", tmp_path / "run", tmp_path / "hf", "--dtype", dtype)
    again = HuggingFaceSource(tmp_path / "hf")
    assert again.config == HuggingFaceSource(release).config
    assert_holds(again, expected)
    text = grok("verify", tmp_path / "hf", release)
    assert "bit for bit" in text and text.endswith("equal\n")
    # Without a window the files of a Mistral are those of a Llama.
    assert f"in the layout of {again.adapter.family}" in output
    stated, back = (json.loads((f / "config.json").read_text()) for f in (release, tmp_path / "hf"))
    # What the tokenizer says is not known here; sglang's table has as many positions as the model.
    free = {"bos_token_id", "eos_token_id", "transformers_version", "rope_scaling"}
    free |= {"original_max_position_embeddings"}
    assert {k: v for k, v in stated.items() if k not in free} == {
        k: v for k, v in back.items() if k in stated and k not in free
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_import_as_int8(tmp_path, family):
    grok("import", "hf", FOLDER / family, tmp_path / "run", "--dtype", "int8")
    imported = open_source(tmp_path / "run")
    assert imported.dtype == "int8"
    expected = tree(family, imported.config)
    floats = converted(imported, "float32")
    for name, spec in imported.tensors.items():
        values, exact = floats.read(name, spec.full_part), expected[name].astype(np.float32)
        if spec.param.is_matmul:
            # Half a step of 1/127 of the column's largest value, the scale rounded to bfloat16.
            assert np.abs(values - exact).max() <= np.abs(exact).max() * (0.5 / 127 + 2**-8)
        else:
            assert values.tobytes() == exact.tobytes()


@pytest.mark.parametrize("sizes", [None, (2, 2, 2), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_release_is_loaded_onto_a_mesh(family, dtype, sizes):
    """Shares of devices that end inside of a rank's part, and scales of int8 on each of them."""
    mesh = sizes and package.make_mesh(*sizes)
    arrays = to_arrays(package.load(FOLDER / family, mesh=mesh, dtype=dtype))
    expected = tree(family, HuggingFaceSource(FOLDER / family).config)
    for name, values in expected.items():
        exact = values.astype(np.float32)
        if name in arrays:
            np.testing.assert_array_equal(arrays[name], exact)
        else:
            spec = param_specs(HuggingFaceSource(FOLDER / family).config)[name]
            stored = (np.asarray(arrays[f"{name}/{part}"]) for part in ("values", "scales"))
            floats = dequantize(*stored, np.float32, spec.contract_dims, spec.output_dims)
            assert np.abs(floats - exact).max() <= np.abs(exact).max() * (0.5 / 127 + 2**-8)


def test_files_of_an_export_of_grok_2_are_the_releases(tmp_path):
    export_huggingface(HuggingFaceSource(FOLDER / "grok2"), tmp_path / "hf")
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert files == sorted(path.name for path in (FOLDER / "grok2").glob("*.safetensors"))
    assert len(files) == 39
    assert not (tmp_path / "hf" / INDEX).exists()
    for file in files:
        mine, theirs = load_file(tmp_path / "hf" / file), load_file(FOLDER / "grok2" / file)
        assert list(mine) == list(theirs)
        for name in mine:
            assert mine[name].tobytes() == theirs[name].tobytes()


def test_an_export_of_grok_2_from_int8_continues(tmp_path):
    source = converted(HuggingFaceSource(FOLDER / "grok2"), "int8")
    export_huggingface(source, tmp_path / "hf", "float32")
    expected = converted(source, "float32")
    back = HuggingFaceSource(tmp_path / "hf")
    for name, spec in back.tensors.items():
        values = expected.read(name, spec.full_part)
        assert back.read(name, spec.full_part).tobytes() == values.tobytes(), name
    with pytest.raises(ConfigError, match="Grok-2 has one kind of tensor in each; leave it out"):
        export_huggingface(source, tmp_path / "other", shard_bytes=1 << 30)


def test_merged_copies_of_grok_2(tmp_path):
    folder = tmp_path / "merged"
    folder.mkdir()
    tensors = released("grok2")
    names = sorted(tensors)
    for i in range(3):
        part = {name: np.ascontiguousarray(tensors[name]) for name in names[i::3]}
        save_file(part, folder / f"model-{i + 1:05d}-of-00003.safetensors", {"format": "pt"})
    shutil.copy(FOLDER / "grok2" / "config.json", folder)
    source = HuggingFaceSource(folder)
    assert source.adapter.name == "grok-2"
    assert_holds(source, tree("grok2", source.config))


# ---- heads, buffers, types


def copy(folder: Path, family: str, **changes) -> Path:
    """A golden folder with changes to its config.json; without what is changed to None."""
    shutil.copytree(FOLDER / family, folder, copy_function=shutil.copyfile)
    data = json.loads((folder / "config.json").read_text()) | changes
    data = {key: value for key, value in data.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(data))
    return folder


def set_tensors(folder: Path, **changes: np.ndarray | None) -> Path:
    """Other tensors in the folder's first file, which is rewritten; the index is removed."""
    (folder / INDEX).unlink(missing_ok=True)
    for file in folder.glob("*.safetensors"):
        tensors = {k: v for k, v in load_file(file).items() if k not in changes}
        if "00001-of" in file.name:
            tensors |= {k: v for k, v in changes.items() if v is not None}
        save_file(tensors, file, {"format": "pt"})
    return folder


def refusal(folder: Path, config: ModelConfig | None = None) -> str:
    with pytest.raises(CheckpointError) as error:
        HuggingFaceSource(folder, config)
    return str(error.value).removeprefix(f"{folder}").removeprefix("/")


def test_tied_and_untied_heads(tmp_path):
    table = released("llama31")["model.embed_tokens.weight"]
    without = set_tensors(copy(tmp_path / "untied", "llama31"), **{"lm_head.weight": None})
    assert refusal(without) == (
        ": lm_head.weight is missing; its output layer is not the token table."
    )
    tied = set_tensors(
        copy(tmp_path / "tied", "llama31", tie_word_embeddings=True), **{"lm_head.weight": None}
    )
    both = set_tensors(
        copy(tmp_path / "both", "llama31", tie_word_embeddings=True), **{"lm_head.weight": table}
    )
    for folder in (tied, both):
        source = HuggingFaceSource(folder)
        assert source.config.tie_embeddings
        expected = tree("llama31", source.config)
        del expected["lm_head/table_VD"]
        assert_holds(source, expected)
    # Exports of tied models have the table once, as the family's do.
    export_huggingface(source, tmp_path / "hf")
    assert HuggingFaceSource(tmp_path / "hf").config == source.config
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    assert "lm_head.weight" not in index["weight_map"]

    other = copy(tmp_path / "other", "llama31", tie_word_embeddings=True)
    source = HuggingFaceSource(other)
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from the token table, fir"):
        source.read("embed/table_VD", source.tensors["embed/table_VD"].full_part)


def test_frequencies_of_early_files_are_ignored(tmp_path):
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    frequencies = {name.format(layer): np.ones(4, np.float32) for layer in range(4)}
    folder = set_tensors(copy(tmp_path / "hf", "llama2"), **frequencies)
    assert_holds(HuggingFaceSource(folder), tree("llama2", HuggingFaceSource(folder).config))
    other = {"model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float16)}
    assert "'model.layers.0.self_attn.q_proj.bias' does not belong here; this folder's" in refusal(
        set_tensors(copy(tmp_path / "bias", "llama2"), **other)
    )


def test_mistrals_own_files_are_not_read(tmp_path):
    folder = set_tensors(copy(tmp_path / "hf", "mistral"))
    save_file({"layers.0.attention.wq.weight": np.ones(4)}, folder / "consolidated.safetensors")
    assert_holds(HuggingFaceSource(folder), tree("mistral", HuggingFaceSource(folder).config))
    for file in folder.glob("model-*"):
        file.unlink()
    assert refusal(folder) == (
        ": has weights in Mistral's own layout (consolidated.safetensors), which is not read; the "
        "files model-*.safetensors of the same repository would work."
    )


def test_values_too_large_for_float16(tmp_path):
    source = HuggingFaceSource(FOLDER / "mistral")
    table = released("mistral")["model.embed_tokens.weight"].copy()
    table[3, 5] = 1e5
    folder = set_tensors(copy(tmp_path / "hf", "mistral"), **{"model.embed_tokens.weight": table})
    export_huggingface(source, tmp_path / "small", "float16")
    assert HuggingFaceSource(tmp_path / "small").dtype == "float16"
    message = "model.embed_tokens.weight has values that are not finite in float16; bfloat16 or"
    with pytest.raises(CheckpointError, match=message):
        export_huggingface(HuggingFaceSource(folder), tmp_path / "large", "float16")


# ---- config.json


@pytest.mark.parametrize("file", sorted(RELEASED_CONFIGS.glob("*.json")), ids=lambda f: f.stem)
def test_a_released_config_is_the_preset(file):
    data = json.loads(file.read_text())
    adapter = next(a for a in ADAPTERS if data["model_type"] in a.model_types)
    preset = file.stem.removesuffix("-v0.1") if "mixtral" in file.stem else file.stem
    model = adapter.read_config(str(file), data)
    assert model == load_config(preset).model
    assert preset_of(model) == preset
    written = adapter.config_data(model, data["torch_dtype"])
    assert {k: v for k, v in written.items() if k in data} == {
        k: v for k, v in data.items() if k not in ("transformers_version",)
    } | {k: None for k in ("bos_token_id", "eos_token_id") if k in data}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": LLAMA3 | {"type": "llama3"}},
        {"rope_scaling": LLAMA3 | {"type": "llama3", "rope_type": "llama3"}},
        {
            "rope_theta": None,
            "rope_scaling": None,
            "torch_dtype": None,
            "dtype": "bfloat16",
            "rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 500000.0},
            "transformers_version": "5.24.0",
            "pad_token_id": 0,
        },
        {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 500000.0}},
        {"eos_token_id": [2, 3]},
        {"quantization_config": None},
    ],
)
def test_spellings_of_one_config(tmp_path, changes):
    expected = HuggingFaceSource(FOLDER / "llama31").config
    assert HuggingFaceSource(copy(tmp_path / "hf", "llama31", **changes)).config == expected


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama2", {"attention_bias": True}, "attention_bias is true; Llama models are read with"),
        ("llama2", {"mlp_bias": True}, "mlp_bias is true; Llama models are read with false only."),
        ("llama2", {"hidden_act": "relu"}, 'hidden_act is "relu"; Llama models are read with "si'),
        ("llama2", {"pretraining_tp": 2}, "pretraining_tp is 2; Llama models are read with 1 only"),
        ("llama2", {"attention_dropout": 0.1}, "attention_dropout is 0.1; Llama models are read"),
        (
            "llama2",
            {"sliding_window": 4096},
            "'sliding_window' is 4096, and no Llama model that is known here has such a key; "
            "delete it if it changes nothing that the model computes.",
        ),
        ("llama2", {"quantization_config": {"bits": 4}}, "'quantization_config' is {\"bits\": 4}"),
        ("mistral", {"layer_types": ["sliding"]}, "'layer_types' is [\"sliding\"], and no Mistral"),
        ("mistral", {"sliding_window": -1}, "sliding_window is -1; it should be an integer from 1"),
        (
            "llama2",
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            'rope_scaling.rope_type is "yarn"; "default" and "llama3" are known.',
        ),
        ("llama2", {"rope_scaling": {"factor": 4.0}}, "rope_scaling.rope_type is missing; "),
        (
            "llama2",
            {"rope_scaling": {"type": "yarn", "rope_type": "llama3"}},
            'rope_scaling.rope_type is "llama3" and "yarn"; ',
        ),
        ("llama2", {"rope_scaling": "yarn"}, 'rope_scaling is "yarn"; it should be null or an ob'),
        (
            "llama31",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling.low_freq_factor is missing; it should be a positive number.",
        ),
        (
            "llama31",
            {"rope_scaling": LLAMA3 | {"rope_type": "llama3", "partial_rotary_factor": 0.5}},
            "rope_scaling.partial_rotary_factor is 0.5, which is not known of the rope_type ",
        ),
        (
            "llama31",
            {"rope_parameters": {"rope_type": "default"}},
            "rope_scaling and rope_parameters differ; one is enough.",
        ),
        (
            "llama31",
            {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 1e4}},
            "rope_theta is 500000.0, and rope_parameters.rope_theta 10000.0; one is enough.",
        ),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1; Mixtral models are"),
        ("mixtral", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it should be true or f"),
        ("grok2", {"rope_type": "yarn"}, 'rope_type is "yarn"; Grok-2 models are read with "origi'),
        ("grok2", {"sliding_window_size": 512}, "sliding_window_size is 512; Grok-2 models are re"),
        ("grok2", {"load_presharded_attn": True}, "load_presharded_attn is true; Grok-2 models ar"),
        ("grok2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping is 0; it should be a pos"),
        ("grok2", {"router_logit_softcapping": None}, "router_logit_softcapping is missing."),
        ("grok2", {"new_switch": 1}, "'new_switch' is 1, and no Grok-2 model that is known here"),
    ],
)
def test_what_config_json_says_and_is_not_known_is_refused(tmp_path, family, changes, message):
    folder = copy(tmp_path / "hf", family, **changes)
    assert refusal(folder).startswith(f"config.json: {message}")


def test_defaults_of_the_families_classes(tmp_path):
    """As transformers has them; a key that is null says something else than a missing one."""
    mistral = copy(tmp_path / "mistral", "mistral", sliding_window=None, rope_theta=None)
    config = HuggingFaceSource(mistral).config
    assert (config.attention.window, config.attention.rope.theta) == (4096, 10000.0)
    data = json.loads((mistral / "config.json").read_text()) | {"sliding_window": None}
    (mistral / "config.json").write_text(json.dumps(data))
    assert HuggingFaceSource(mistral).config.attention.window is None
    mixtral = copy(tmp_path / "mixtral", "mixtral", rope_theta=None, rms_norm_eps=None)
    config = HuggingFaceSource(mixtral).config
    assert (config.attention.rope.theta, config.norm.eps) == (1e6, 1e-5)
    llama = copy(tmp_path / "llama", "llama2", head_dim=None, num_key_value_heads=None)
    assert HuggingFaceSource(llama).config == HuggingFaceSource(FOLDER / "llama2").config
    grok_2 = copy(tmp_path / "grok-2", "grok2", attn_temperature_len=-1)
    assert HuggingFaceSource(grok_2).config.attention.temperature_length is None


@pytest.mark.parametrize("model_type", ["qwen2", "gemma3_text", "deepseek_v3"])
@pytest.mark.parametrize("files", [True, False])
def test_a_family_that_is_not_known(tmp_path, model_type, files):
    folder = copy(tmp_path / "hf", "llama31", model_type=model_type)
    if not files:
        for file in folder.glob("model*"):
            file.unlink()
    message = (
        f"{folder}/config.json: model_type is '{model_type}', a family that is not known; those "
        "that are: Grok-1 (grok-1), Grok-2 (git), Llama (llama), Mistral (mistral), Mixtral "
        "(mixtral)."
    )
    result = CliRunner().invoke(main, ["inspect", str(folder)])
    assert result.exit_code == 2
    assert message in " ".join(result.stdout.split())
    result = CliRunner().invoke(main, ["import", "hf", str(folder), str(tmp_path / "run")])
    assert (result.exit_code, result.stderr) == (2, f"error: {message}\n")
    assert not (tmp_path / "run").exists()


def test_grok_2_is_known_whatever_its_model_type(tmp_path):
    folder = copy(tmp_path / "hf", "grok2", model_type="grok", architectures=["Other"])
    assert HuggingFaceSource(folder).adapter.name == "grok-2"
    folder = copy(tmp_path / "copy", "grok2", model_type="grok-1", residual_moe=None)
    assert HuggingFaceSource(folder).adapter.name == "grok-2"
    (folder / "config.json").unlink()
    config = HuggingFaceSource(FOLDER / "grok2").config
    assert HuggingFaceSource(folder, config).adapter.name == "grok-2"


def test_the_activation_of_grok_2_may_be_chosen(tmp_path):
    """No file says it. An export could not either, and its readers take the error function."""
    tanh = {"mlp.activation": "gelu_tanh", "moe.activation": "gelu_tanh"}
    config = replace_keys(HuggingFaceSource(FOLDER / "grok2").config, tanh)
    source = HuggingFaceSource(FOLDER / "grok2", config)
    assert source.config == config
    message = r'^model\.mlp\.activation="gelu_tanh" has no place in a Hugging Face folder of Grok-2'
    with pytest.raises(ConfigError, match=message):
        export_huggingface(source, tmp_path / "hf")
    silu = replace_keys(config, {"moe.activation": "silu"})
    with pytest.raises(ConfigError, match=r'^model\.moe\.activation="silu" has no place in a Hugg'):
        HuggingFaceSource(FOLDER / "grok2", silu)


def test_without_config_json_the_expected_model_tells_the_family(tmp_path):
    config = HuggingFaceSource(FOLDER / "mistral").config
    folder = copy(tmp_path / "hf", "mistral")
    (folder / "config.json").unlink()
    assert HuggingFaceSource(folder, config).adapter.name == "mistral"
    assert "config.json: is missing; without it a config must be given." in refusal(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_inspect(family):
    report = json.loads(grok("inspect", FOLDER / family, "--json"))
    assert report["complete"] and report["format"] == "huggingface"
    assert report["parameters"]["total"] == PARAMETERS[family]
    assert report["dtype"] == RELEASE_DTYPES.get(family, "bfloat16")
    assumed = {"param_dtype", "embedding_dtype", "compute_dtype", "matmul_dtype", "remat"}
    if family == "llama2":
        assumed |= {"attention.rope.theta", "attention.head_dim"}
    assert set(report["assumed"]) == assumed
    text = grok("inspect", FOLDER / family)
    origins = {row.split()[0]: row.split()[-1] for row in text.splitlines() if row.split()}
    assert (origins["norm.eps"], origins["norm.sandwich"]) == ("config.json", "family")
    assert f"parameters  {PARAMETERS[family]:,}" in text and "complete    yes" in text


# ---- which family an export is of


def test_the_family_of_an_export(tmp_path):
    models = {family: HuggingFaceSource(FOLDER / family).config for family in FAMILIES}
    for family, model in models.items():
        assert adapter_for_export(model).name == ADAPTER_NAMES[family]
    plain = replace_keys(models["mistral"], {"attention.window": None})
    # Both can hold it: the first, or the one that is asked for, or that of a folder.
    assert adapter_for_export(plain).name == "llama"
    assert adapter_for_export(plain, "mistral").name == "mistral"
    data = json.loads((FOLDER / "mistral" / "config.json").read_text()) | {"sliding_window": None}
    folder = copy(tmp_path / "hf", "mistral")
    (folder / "config.json").write_text(json.dumps(data))
    done = export_huggingface(HuggingFaceSource(folder), tmp_path / "out")
    assert done.family == "Mistral"
    with pytest.raises(
        ConfigError, match=r"^model\.attention\.window=20 has no place in a Hugging"
    ):
        adapter_for_export(models["mistral"], "llama")
    with pytest.raises(ConfigError, match="family=gpt is none of grok-1, grok-2, llama, mistral,"):
        adapter_for_export(plain, "gpt")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mixtral", {"moe.normalize": False}, "model.moe.normalize=false has no place in a Huggi"),
        ("grok2", {"moe.activation": "silu"}, 'model.moe.activation="silu" has no place in a Hu'),
        ("grok2", {"moe.dim": 44}, "model.moe.dim=44 has no place in a Hugging Face folder of Gr"),
        ("llama2", {"logit_softcap": 30.0}, "model.logit_softcap=30.0 has no place in a Hugging "),
        ("llama31", {"norm.sandwich": True}, "model.norm.sandwich=true has no place in a Hugging"),
    ],
)
def test_a_model_that_no_layout_holds(tmp_path, family, changes, message):
    config = replace_keys(HuggingFaceSource(FOLDER / family).config, changes)
    source = RandomSource(dataclasses.replace(config, param_dtype="float32"), dtype="float32")
    with pytest.raises(ConfigError) as error:
        export_huggingface(source, tmp_path / "hf")
    assert str(error.value).startswith(message)
    assert not (tmp_path / "hf").exists()


def test_an_export_in_several_files_has_an_index(tmp_path):
    source = HuggingFaceSource(FOLDER / "mixtral")
    done = export_huggingface(source, tmp_path / "hf", shard_bytes=500_000)
    assert done.files == 3
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    assert index["weight_map"].keys() == released("mixtral").keys()
    for name, file in index["weight_map"].items():
        array = load_file(tmp_path / "hf" / file)[name]
        assert array.tobytes() == np.ascontiguousarray(released("mixtral")[name]).tobytes()
        assert array.dtype == ml_dtypes.bfloat16
