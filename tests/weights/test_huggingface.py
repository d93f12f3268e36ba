"""Hugging Face folders in both layouts -> our tree: names, orientation, parts, refusals."""

import json
import shutil
from pathlib import Path

import fsspec
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from grok import storage
from grok.config import AttentionConfig, ModelConfig, MoEConfig
from grok.errors import CheckpointError
from grok.weights.huggingface.source import HuggingFaceSource
from tests.fixtures.model_weights import shapes_of
from tests.fixtures.models import replace_keys

TINY = ModelConfig(
    vocab_size=24,
    num_layers=11,
    embed_dim=12,
    moe=MoEConfig(dim=20, num_experts=3),
    attention=AttentionConfig(num_heads=6, num_kv_heads=2, head_dim=4),
    context_length=64,
)
CONFIG = {
    "vocab_size": 24,
    "num_hidden_layers": 11,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
# Names written out again, for a slip in one of the two lists to show.
LAYOUTS = {
    "hpcai-tech/grok-1": {
        "table": "model.embed_tokens.weight",
        "norm": "model.norm.scale",
        "layer": "model.layers.{}.",
        "attention": ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj"],
        "router": "moe_block.gate",
        "expert": "moe_block.experts.{}.",
        "norms": [f"{at}_{of}_norm.scale" for of in ("attn", "moe") for at in ("pre", "post")],
        "experts_key": "num_experts",
    },
    "keyfan/grok-1-hf": {
        "table": "transformer.in_out_embed.weight",
        "norm": "transformer.rms_norm.weight",
        "layer": "transformer.decoder_layer.{}.",
        "attention": [f"multi_head_attention.{w}" for w in ("query", "key", "value", "linear")],
        "router": "router",
        "expert": "moe.{}.",
        "norms": ["rms_norm.weight", *(f"rms_norm_{i}.weight" for i in (1, 2, 3))],
        "experts_key": "num_local_experts",
    },
}
HPCAI, KEYFAN = LAYOUTS
DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


def tree(dtype=ml_dtypes.bfloat16, config: ModelConfig = TINY) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes_of(config).items()
    }


def theirs(tree: dict[str, np.ndarray], layout: str = HPCAI) -> dict[str, np.ndarray]:
    """Our tree as the tensors of a layout."""
    own = LAYOUTS[layout]
    attention = {name: tree[f"layers/attention/{name}"] for name in (
        "w_query_DNH", "w_key_DKH", "w_value_DKH", "w_out_NHD"
    )}  # fmt: skip
    norms = [f"layers/{at}_{of}_norm/scale_D" for of in ("attn", "ffn") for at in ("pre", "post")]
    experts = {"linear": "w_gate_EDF", "linear_v": "w_up_EDF", "linear_1": "w_down_EFD"}
    found = {own["table"]: tree["embed/table_VD"], own["norm"]: tree["final_norm/scale_D"]}
    for layer in range(len(tree["layers/moe/router_DE"])):
        at = own["layer"].format(layer)
        for (name, stack), theirs in zip(attention.items(), own["attention"], strict=True):
            d = stack.shape[-1 if name == "w_out_NHD" else 1]
            matrix = stack[layer].reshape((-1, d) if name == "w_out_NHD" else (d, -1))
            found[f"{at}{theirs}.weight"] = matrix.T
        found[f"{at}{own['router']}.weight"] = tree["layers/moe/router_DE"][layer].T
        for expert in range(tree["layers/moe/router_DE"].shape[-1]):
            for theirs, ours in experts.items():
                stack = tree[f"layers/moe/{ours}"]
                name = f"{at}{own['expert'].format(expert)}{theirs}.weight"
                found[name] = stack[layer, expert].T
        for ours, theirs in zip(norms, own["norms"], strict=True):
            found[at + theirs] = tree[ours][layer]
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def write(
    folder: Path,
    tensors: dict[str, np.ndarray],
    files: int = 3,
    config: dict | None = None,
    index: bool = True,
) -> Path:
    """A folder of these tensors, dealt out to some files."""
    folder.mkdir()
    where = {
        name: f"model-{i % files + 1:05d}-of-{files:05d}.safetensors"
        for i, name in enumerate(tensors)
    }
    for file in set(where.values()):
        own = {name: array for name, array in tensors.items() if where[name] == file}
        save_file(own, folder / file, {"format": "pt"})
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    config = CONFIG | {"num_experts": 3} if config is None else config
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_holds(source: HuggingFaceSource, expected: dict[str, np.ndarray]) -> None:
    assert list(source.tensors) == list(shapes_of(source.config))
    for name, spec in source.tensors.items():
        found = source.read(name, spec.full_part)
        assert (spec.shape, spec.dtype, spec.groups) == (found.shape, found.dtype, None)
        assert (found.shape, found.dtype) == (expected[name].shape, expected[name].dtype)
        assert found.tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_of_both_layouts(tmp_path, layout, dtype):
    expected = tree(dtype)
    key = LAYOUTS[layout]["experts_key"]
    folder = write(tmp_path / "hf", theirs(expected, layout), config=CONFIG | {key: 3})
    source = HuggingFaceSource(folder)
    assert (source.format, source.path, source.config) == ("huggingface", str(folder), TINY)
    assert_holds(source, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts(tmp_path, layout):
    expected = tree()
    source = HuggingFaceSource(write(tmp_path / "hf", theirs(expected, layout)), TINY)
    rng = np.random.default_rng(1)
    for name, spec in source.tensors.items():
        for _ in range(20):
            ends = [sorted(rng.choice(size + 1, 2, replace=False)) for size in spec.shape]
            part = tuple(slice(int(start), int(stop)) for start, stop in ends)
            np.testing.assert_array_equal(source.read(name, part), expected[name][part])


def test_matrices_of_many_tiles(tmp_path):
    config = replace_keys(TINY, {"num_layers": 1, "embed_dim": 300, "moe.dim": 700})
    expected = tree(np.float32, config)
    assert_holds(HuggingFaceSource(write(tmp_path / "hf", theirs(expected)), config), expected)


@pytest.mark.parametrize("files", [1, 4])
def test_files_without_index_or_config(tmp_path, files):
    expected = tree()
    folder = write(tmp_path / "hf", theirs(expected), files, index=False)
    (folder / "config.json").unlink()
    (folder / ".DS_Store").touch()
    assert_holds(HuggingFaceSource(folder, TINY), expected)
    with pytest.raises(CheckpointError, match=r"config.json: is missing; without it a config must"):
        HuggingFaceSource(folder)


def test_folder_in_a_bucket(tmp_path, monkeypatch):
    expected = tree()
    folder = write(tmp_path / "hf", theirs(expected))
    bucket = fsspec.filesystem("memory")
    monkeypatch.setattr("grok.storage.google_storage", lambda _: bucket)
    bucket.put(str(folder), "/bucket/hf", recursive=True)
    assert_holds(HuggingFaceSource("gs://bucket/hf"), expected)
    bucket.rm("/bucket", recursive=True)


def test_opening_reads_no_array(tmp_path, monkeypatch):
    folder = write(tmp_path / "hf", theirs(tree()))
    monkeypatch.setattr(storage, "read_ranges", lambda *_: pytest.fail("an array was read"))
    HuggingFaceSource(folder)


def test_config_in_full(tmp_path):
    folder = write(
        tmp_path / "hf",
        theirs(tree()),
        config=CONFIG
        | {
            "num_experts": 3,
            "num_experts_per_tok": 1,
            "embedding_multiplier_scale": 5.5,
            "output_multiplier_scale": 0.25,
            "attn_output_multiplier": 0.125,
            "max_attn_value": 20,
            "rope_theta": 500.0,
            "rms_norm_eps": 1e-6,
            "head_dim": 4,
        },
    )
    assert HuggingFaceSource(folder).config == replace_keys(
        TINY,
        {
            "moe.num_selected": 1,
            "embedding_multiplier": 5.5,
            "logit_multiplier": 0.25,
            "attention.logit_scale": 0.125,
            "attention.logit_softcap": 20.0,
            "attention.rope.theta": 500.0,
            "norm.eps": 1e-6,
        },
    )


def test_head_dim_of_a_config_that_does_not_say(tmp_path):
    config = replace_keys(TINY, {"attention.num_heads": 3, "attention.num_kv_heads": 1})
    data = CONFIG | {"num_experts": 3, "num_attention_heads": 3, "num_key_value_heads": 1}
    folder = write(tmp_path / "hf", theirs(tree(config=config)), config=data | {"head_dim": None})
    assert HuggingFaceSource(folder).config == config


def refusal(folder: Path, config: ModelConfig | None = None) -> str:
    with pytest.raises(CheckpointError) as error:
        HuggingFaceSource(folder, config)
    return str(error.value).removeprefix(f"{folder}").removeprefix("/")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": None}, "config.json: vocab_size is missing, a size of the model."),
        (
            {"hidden_size": "12"},
            "config.json: hidden_size is '12'; it should be an integer from 1 to 16777216.",
        ),
        ({"num_attention_heads": True}, "num_attention_heads is True; it should be an integer"),
        ({"num_key_value_heads": 1 << 60}, "it should be an integer from 1 to 16777216."),
        ({"max_attn_value": -1}, "config.json: max_attn_value is -1; it should be a positive"),
        ({"rope_theta": float("nan")}, "rope_theta is nan; it should be a positive number."),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0; it should be a positive number."),
        ({"head_dim": None, "num_attention_heads": 5}, "so head_dim must be given."),
        ({"num_key_value_heads": 4}, "config.json: model.attention.num_kv_heads=4 does not divide"),
        (
            {"hidden_size": 16},
            "for this folder's config.json it should be (24, 16).",
        ),
        ({"intermediate_size": 24}, "has shape (20, 12); for this folder's config.json it"),
        (
            {"num_hidden_layers": 12},
            "model.layers.11.pre_attn_norm.scale is missing; this folder's config.json has 12 "
            "layers of 3 experts.",
        ),
        (
            {"num_hidden_layers": 10},
            "'model.layers.10.attn.k_proj.weight' does not belong here; this folder's config.json "
            "has 10 layers of 3 experts.",
        ),
        ({"num_experts": 4}, "model.layers.0.moe_block.gate.weight has shape (3, 12)"),
    ],
)
def test_configs_that_contradict_the_tensors(tmp_path, change, message):
    folder = write(tmp_path / "hf", theirs(tree()), config=CONFIG | {"num_experts": 3} | change)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json: cannot be read as JSON: Expecting property name"),
        ("[]", "config.json: should be a JSON object, and is a list."),
        ("[" * 100_000, "config.json: is nested too deeply."),
        ('{"a": 1, "a": 2}', "config.json: cannot be read as JSON: 'a' is there twice."),
        ('{"a": "\xff"}', "config.json: cannot be read as JSON: 'utf-8' codec"),
    ],
)
def test_configs_that_are_none(tmp_path, text, message):
    folder = write(tmp_path / "hf", theirs(tree()))
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert refusal(folder).startswith(message)


def test_another_model_than_the_given_config(tmp_path):
    folder = write(tmp_path / "hf", theirs(tree()))
    other = replace_keys(TINY, {"vocab_size": 32})
    message = refusal(folder, other)
    assert message == (
        "model-00001-of-00003.safetensors: model.embed_tokens.weight has shape (24, 12); for "
        "this model's config it should be (32, 12)."
    )


GATE = "model.layers.3.moe_block.experts.1.linear.weight"


def test_tensors_missing_extra_renamed_and_of_mixed_types(tmp_path):
    def message(name: str, **changes: np.ndarray | None) -> str:
        tensors = theirs(tree()) | {GATE if key == "gate" else key: v for key, v in changes.items()}
        kept = {key: value for key, value in tensors.items() if value is not None}
        return refusal(write(tmp_path / name, kept, files=1))

    size = "this folder's config.json has 11 layers of 3 experts."
    file = "model-00001-of-00001.safetensors"
    assert message("missing", gate=None) == f": {GATE} is missing; {size}"
    extra = np.zeros(3, np.float32)
    assert message("extra", bias=extra) == f"{file}: 'bias' does not belong here; {size}"
    assert message("transposed", gate=np.zeros((12, 20), np.float32)) == (
        f"{file}: {GATE} has shape (12, 20); for this folder's config.json it should be (20, 12)."
    )
    assert message("mixed", gate=np.zeros((20, 12), np.float32)) == (
        f"{file}: {GATE} is float32, and model.layers.0.moe_block.experts.0.linear.weight is "
        "bfloat16; all layers and experts should have one type."
    )


def test_a_folder_of_another_model(tmp_path):
    llama = {"model.layers.0.self_attn.q_proj.weight": np.zeros((2, 2), np.float32)}
    message = refusal(write(tmp_path / "hf", llama))
    assert message == (
        ": its tensors have names of another model, such as "
        "'model.layers.0.self_attn.q_proj.weight'; known are those of Grok-1 (hpcai-tech/grok-1, "
        "keyfan/grok-1-hf), Grok-2 (xai-org/grok-2), Llama (meta-llama), Mistral (mistralai), "
        "Mixtral (mistralai)."
    )


def test_files_and_index_that_disagree(tmp_path):
    def message(name: str, change) -> str:
        folder = write(tmp_path / name, theirs(tree()))
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        change(folder, index["weight_map"])
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return refusal(folder)

    first, second = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    table = "model.embed_tokens.weight"
    index = "model.safetensors.index.json"
    assert message("absent", lambda folder, _: (folder / first).unlink()) == (
        f"{first}: is missing; the index says that it has '{table}'."
    )
    assert message("elsewhere", lambda _, where: where.update({table: second})) == (
        f"{first}: has '{table}', which {index} says is in {second}."
    )
    assert message("unlisted", lambda _, where: where.pop(table)) == (
        f"{first}: has '{table}', which {index} leaves out."
    )
    assert message("promised", lambda _, where: where.update(bias=second)) == (
        f"{second}: has no 'bias', which {index} says it has."
    )
    assert message("outside", lambda _, where: where.update(bias="../x.safetensors")) == (
        f"{index}: 'bias' is said to be in '../x.safetensors'; that should be the name of a "
        "safetensors file in this folder."
    )
    assert message("empty", lambda _, where: where.clear()) == (
        f"{index}: should have a weight_map from tensors to files."
    )


def test_files_that_are_not_there_or_say_things_twice(tmp_path):
    folder = write(tmp_path / "hf", theirs(tree()), index=False)
    file = folder / "model-00001-of-00003.safetensors"
    shutil.copy(file, folder / "model-00004.safetensors")
    assert refusal(folder) == (
        f"model-00004.safetensors: 'model.embed_tokens.weight' is in {file} too; it should be in "
        "one file."
    )
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert refusal(folder) == ": has no *.safetensors files."
    (folder / "pytorch_model-00001-of-00019.bin").touch()
    assert refusal(folder) == (
        ": has pickled weights (pytorch_model-00001-of-00019.bin), which cannot be read without "
        "executing what they say; a copy in safetensors would work."
    )
    assert ": cannot be read: No such file" in refusal(tmp_path / "nowhere")


def test_one_table_for_embedding_and_output(tmp_path):
    expected = tree()
    table = expected["embed/table_VD"]
    table[5] = np.nan
    tied = theirs(expected) | {"lm_head.weight": table}
    assert_holds(HuggingFaceSource(write(tmp_path / "tied", tied)), expected)

    other = table.copy()
    other[17, 3] += 1
    source = HuggingFaceSource(write(tmp_path / "other", tied | {"lm_head.weight": other}))
    below, above = (slice(0, 17), slice(0, 12)), (slice(10, 24), slice(2, 5))
    assert source.read("embed/table_VD", below).tobytes() == table[below].tobytes()
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from the token table, fir"):
        source.read("embed/table_VD", above)
    with pytest.raises(CheckpointError, match="first for token 17; Grok-1 has one table for both"):
        source.read("embed/table_VD", source.tensors["embed/table_VD"].full_part)

    float32 = tied | {"lm_head.weight": table.astype(np.float32)}
    assert refusal(write(tmp_path / "types", float32, files=1)) == (
        "model-00001-of-00001.safetensors: lm_head.weight is float32 (24, 12), and the token "
        "table bfloat16 (24, 12); Grok-1 has one table for both."
    )


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    folder = write(tmp_path / "hf", theirs(tree()), files=1)
    source = HuggingFaceSource(folder)
    file = folder / "model-00001-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    last = source.tensors["final_norm/scale_D"]
    with pytest.raises(
        CheckpointError, match=r"of-00001\.safetensors: .* became shorter while it was"
    ):
        source.read(last.name, last.full_part)
