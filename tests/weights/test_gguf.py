"""GGUF files: values, names, types and keys as llama.cpp's own reader finds them. What llama.cpp
computes of them is in tests/prove/test_llama_cpp.py."""

import dataclasses

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from grok.cli.main import main
from grok.config import AttentionConfig, ModelConfig, MoEConfig
from grok.data.tokenizers import load_tokenizer
from grok.data.tokenizers.gguf import gguf_keys
from grok.errors import CheckpointError, ConfigError, DataError
from grok.weights.cast import converted
from grok.weights.gguf.export import export_gguf
from grok.weights.huggingface.source import HuggingFaceSource
from tests.fixtures.families import FOLDER
from tests.fixtures.models import replace_keys
from tests.fixtures.random_weights import RandomSource
from tests.fixtures.tokenizers import make_release

# Of Grok-1's form; the experts' width is no multiple of the 32 values of a block of q8_0.
TINY = ModelConfig(
    vocab_size=96,
    num_layers=2,
    embed_dim=64,
    moe=MoEConfig(dim=48, num_experts=4),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16),
)


def read(path) -> tuple[dict, dict]:
    """The keys of a file, and its tensors by name."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {tensor.name: tensor for tensor in reader.tensors}


def full(source, name: str) -> np.ndarray:
    return source.read(name, source.tensors[name].full_part)


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_values_of_grok_1s_form(tmp_path, dtype):
    source = converted(RandomSource(TINY, dtype="float32"), dtype)
    done = export_gguf(source, tmp_path / "a.gguf", "float32", base_weights="xai-org/grok-1")
    keys, tensors = read(tmp_path / "a.gguf")
    floats = converted(source, "float32")
    assert (done.architecture, done.tensors, len(tensors)) == ("grok", 26, 26)
    assert done.nbytes == (tmp_path / "a.gguf").stat().st_size
    # [out, in], and of every expert.
    query = full(floats, "layers/attention/w_query_DNH")[1].reshape(64, 64).T
    np.testing.assert_array_equal(tensors["blk.1.attn_q.weight"].data, query)
    up_EFD = full(floats, "layers/moe/w_up_EDF")[0].transpose(0, 2, 1)
    np.testing.assert_array_equal(tensors["blk.0.ffn_up_exps.weight"].data, up_EFD)
    np.testing.assert_array_equal(tensors["token_embd.weight"].data, full(floats, "embed/table_VD"))
    assert "output.weight" not in tensors
    expected = {
        "general.base_model.0.repo_url": "https://huggingface.co/xai-org/grok-1",
        "general.license": "apache-2.0",
        "grok.attention.output_scale": 0.25,
        "grok.attn_logit_softcapping": 30.0,
        "grok.embedding_scale": 8.0,
        "grok.expert_used_count": 2,
        "grok.logit_scale": np.float32(0.5773502691896257),
        "tokenizer.ggml.model": "none",
    }
    assert {key: keys[key] for key in expected} == expected


def test_types(tmp_path):
    source = RandomSource(TINY, dtype="float32")
    for dtype, name in (("bfloat16", "BF16"), ("float16", "F16"), ("q8_0", "Q8_0")):
        export_gguf(source, tmp_path / dtype, dtype)
        tensors = read(tmp_path / dtype)[1]
        assert tensors["blk.0.attn_q.weight"].tensor_type.name == name
        for small in ("blk.0.ffn_gate_inp.weight", "blk.1.layer_output_norm.weight"):
            assert tensors[small].tensor_type.name == "F32"
    # No blocks fill the rows of 48.
    assert tensors["blk.0.ffn_down_exps.weight"].tensor_type.name == "F16"
    stored = tensors["blk.0.attn_q.weight"]
    values = gguf.quants.dequantize(stored.data, stored.tensor_type)
    query = full(source, "layers/attention/w_query_DNH")[0].reshape(64, 64).T
    # Half a step, and the rounding of the scale to float16.
    step = np.abs(query).reshape(64, 2, 32).max(-1, keepdims=True) / 127
    assert (np.abs(values - query).reshape(64, 2, 32) <= 0.57 * step).all()


def test_llamas_heads_are_turned_as_neighbours(tmp_path):
    source = HuggingFaceSource(FOLDER / "llama31")
    export_gguf(source, tmp_path / "a.gguf", "float32")
    keys, tensors = read(tmp_path / "a.gguf")
    a = source.config.attention
    key = full(source, "layers/attention/w_key_DKH")[0].astype(np.float32)
    halves = key.reshape(-1, a.num_kv_heads, 2, a.head_dim // 2)
    neighbours = halves.transpose(1, 3, 2, 0).reshape(-1, source.config.embed_dim)
    np.testing.assert_array_equal(tensors["blk.0.attn_k.weight"].data, neighbours)
    value = full(source, "layers/attention/w_value_DKH")[0].astype(np.float32)
    np.testing.assert_array_equal(
        tensors["blk.0.attn_v.weight"].data, value.reshape(source.config.embed_dim, -1).T
    )
    divisors = tensors["rope_freqs.weight"].data
    assert divisors.shape == (a.head_dim // 2,)
    np.testing.assert_allclose([divisors[0], divisors[-1]], [1, a.rope.scaling.factor], rtol=1e-6)
    assert keys["llama.rope.freq_base"] == a.rope.theta


def test_what_llama_cpp_cannot_hold_is_refused(tmp_path):
    grok_2 = HuggingFaceSource(FOLDER / "grok2")
    with pytest.raises(ConfigError, match=r"no Grok-2 as it was released.*`grok export hf`"):
        export_gguf(grok_2, tmp_path / "a.gguf")
    wide = replace_keys(TINY, {"attention.head_dim": 32})
    with pytest.raises(ConfigError, match=r"head_dim=32 .*`grok export hf` writes any width"):
        export_gguf(RandomSource(wide), tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match=r"^gs://bucket/a\.gguf: the output goes to a local"):
        export_gguf(RandomSource(TINY), "gs://bucket/a.gguf")
    source = RandomSource(TINY, dtype="float32")
    source._pools["embed/table_VD"] *= np.float32(1e6)
    with pytest.raises(CheckpointError, match="not finite in float16"):
        export_gguf(source, tmp_path / "a.gguf", "float16")
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.gguf").touch()
    with pytest.raises(CheckpointError, match=r"a\.gguf: is there already"):
        export_gguf(source, tmp_path / "a.gguf")


def test_tokenizers(tmp_path):
    folder = make_release(tmp_path / "llama31", "llama31")
    tokenizer = load_tokenizer(folder)
    keys = gguf_keys(tokenizer, 400)
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", "llama-bpe")
    assert keys["tokenizer.ggml.add_bos_token"] is True
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == 400
    assert (tokens[312], kinds[312], kinds[399]) == (b"<|begin_of_text|>", 3, 5)
    assert keys["tokenizer.ggml.bos_token_id"] == 312
    text = tokenizer.files.data.decode()
    changed = dataclasses.replace(tokenizer.files, data=text.replace("{1,3}", "{1,2}").encode())
    tokenizer.files = changed
    with pytest.raises(DataError, match=r"a pattern that llama\.cpp has no word for"):
        gguf_keys(tokenizer, 400)

    keys = gguf_keys(load_tokenizer(make_release(tmp_path / "llama2", "llama2")), 320)
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.add_space_prefix"]) == (
        "llama",
        True,
    )
    assert keys["tokenizer.ggml.tokens"][1:4] == [b"<s>", b"</s>", b"<0x00>"]
    assert keys["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    grok_2 = load_tokenizer(make_release(tmp_path / "grok2", "grok2"))
    with pytest.raises(DataError, match=r"tokenizer\.tok\.json.*--without-tokenizer"):
        gguf_keys(grok_2, 400)


def test_the_command(tmp_path):
    (tmp_path / "run").mkdir()
    folder = FOLDER / "mistral"

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(main, ["export", "gguf", str(folder), *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    output = run(tmp_path / "a.gguf", "--without-tokenizer")
    assert "as llama.cpp's llama (Mistral)" in output
    assert "the file states a context of 20 tokens, the model's sliding window" in output
    keys, _ = read(tmp_path / "a.gguf")
    assert (keys["llama.context_length"], keys["tokenizer.ggml.model"]) == (20, "none")
    make_release(tmp_path / "t", "mistral")
    run(tmp_path / "b.gguf", "--tokenizer", tmp_path / "t")
    assert read(tmp_path / "b.gguf")[0]["tokenizer.ggml.model"] == "llama"
