"""Tokenizer files that are damaged, or of kinds that cannot be expressed: a sentence for each."""

import base64
import json
from pathlib import Path

import pytest

from grok.data.tokenizers import load_tokenizer
from grok.errors import DataError
from tests.fixtures.tokenizers import FAMILIES, converted_sentencepiece, edit_json, make_release

METASPACE = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always"}
STRIP = {"type": "Strip", "content": " ", "start": 2, "stop": 0}


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as error:
        load_tokenizer(path)
    sentence = str(error.value)
    assert sentence.endswith(".")
    assert len(sentence) < 500
    return sentence


@pytest.fixture
def tok_json(tmp_path) -> Path:
    return make_release(tmp_path, "grok2") / "tokenizer.tok.json"


@pytest.fixture
def tokenizer_json(tmp_path) -> Path:
    return make_release(tmp_path, "llama31") / "tokenizer.json"


def with_entry(entry, key="regular_tokens") -> dict:
    fields = json.loads((FAMILIES / "grok2" / "tokenizer.tok.json").read_text())
    return {key: [*fields[key][:-1], entry]}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"regular_tokens": 7}, "regular_tokens is no list of tokens"),
        ({"special_tokens": None}, "special_tokens is no list of tokens"),
        (with_entry({"bytes": [300], "token": 9}), r"regular_tokens\[314\] is .*would work"),
        (with_entry({"bytes": 10**12, "token": 9}), r"regular_tokens\[314\] is"),
        (with_entry({"bytes": "ab", "token": 9}), r"regular_tokens\[314\] is"),
        (with_entry({"bytes": [], "token": 9}), r"regular_tokens\[314\] is"),
        (with_entry({"bytes": [1, 2], "token": 1.5}), r"regular_tokens\[314\] is"),
        (with_entry({"bytes": [1, 2], "token": True}), r"regular_tokens\[314\] is"),
        (with_entry({"token": 9}), r"regular_tokens\[314\] is"),
        (with_entry([1, 2]), r"regular_tokens\[314\] is"),
        (with_entry({"bytes": [0], "token": 319}), r"has the bytes of token 5 again"),
        (with_entry({"bytes": [7, 7], "token": 5}), "two tokens have the id 5"),
        (with_entry({"bytes": [7, 7], "token": -1}), "token of id -1; ids from 0"),
        (with_entry({"bytes": [7, 7], "token": 1 << 40}), "token of id 1099511627776; ids from 0"),
        (with_entry({"bytes": [255], "token": 4}, "special_tokens"), "is not UTF-8"),
        ({"regular_tokens": [{"bytes": [65], "token": 9}]}, "no token for byte 0x00"),
        ({"vocab_size": 300}, "vocab_size is 300 and the last token's id 319; 320 would work"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"word_split": "V2"}, "word_split is 'V2'; V1 would work"),
        ({"word_split": ["V1"]}, "word_split is"),
        ({"pat_str": "(" * 50}, "cannot be used to split text"),
        ({"pat_str": 7}, "cannot be used to split text"),
    ],
)
def test_a_damaged_tok_json(tok_json, changes, sentence):
    edit_json(tok_json, **changes)
    with pytest.raises(DataError, match=sentence):
        load_tokenizer(tok_json)
    assert str(tok_json) in refusal(tok_json)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": {"type": "WordPiece", "vocab": {}}}, "model is WordPiece.* BPE model would"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "its model is Unigram"),
        ({"model": 3}, "its model is none"),
        ({"decoder": None}, "its decoder is none, which is not supported; ByteLevel"),
        (
            {"decoder": {"type": "WordPiece", "prefix": "#", "cleanup": True}},
            "decoder is WordPiece",
        ),
        ({"decoder": METASPACE}, "its decoder is Metaspace"),
        ({"decoder": {"type": "Sequence", "decoders": [STRIP]}}, "its decoder is Strip"),
        (
            {"post_processor": {"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 2]}},
            "post-processor is BertProcessing.* TemplateProcessing would work",
        ),
        ({"added_tokens": 5}, "added_tokens is no list"),
        ({"added_tokens": [{"id": 1}]}, "added_tokens has"),
        ({"pre_tokenizer": {"type": "Unheard"}}, "is no tokenizer.json"),
    ],
)
def test_a_tokenizer_json_that_cannot_be_expressed(tokenizer_json, changes, sentence):
    fields = json.loads(tokenizer_json.read_text())
    tokenizer_json.write_text(json.dumps({**fields, **changes}))
    with pytest.raises(DataError, match=sentence):
        load_tokenizer(tokenizer_json)
    assert str(tokenizer_json) in refusal(tokenizer_json)


def test_pieces_that_end_words_are_refused(tokenizer_json):
    fields = json.loads(tokenizer_json.read_text())
    fields["model"]["end_of_word_suffix"] = "</w>"
    tokenizer_json.write_text(json.dumps(fields))
    assert "end_of_word_suffix='</w>'" in refusal(tokenizer_json)


def test_a_decoder_that_strips_more_than_one_space_is_refused(tmp_path):
    fields = converted_sentencepiece("llama2", "normalizer")
    fields["decoder"]["decoders"][-1] = STRIP
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    assert "its decoder is Replace, ByteFallback, Fuse, Strip" in refusal(tmp_path)


def test_a_post_processor_of_several_tokens_is_refused(tokenizer_json):
    fields = json.loads(tokenizer_json.read_text())
    template = fields["post_processor"]["processors"][1]
    template["single"] = [template["single"][0], *template["single"]]
    tokenizer_json.write_text(json.dumps(fields))
    assert "puts tokens [312, 312] before a text" in refusal(tokenizer_json)
    del template["special_tokens"]["<|begin_of_text|>"]
    tokenizer_json.write_text(json.dumps(fields))
    assert "tokenizer.json" in refusal(tokenizer_json)


def test_an_added_token_whose_id_the_library_would_change(tokenizer_json):
    fields = json.loads(tokenizer_json.read_text())
    fields["added_tokens"][-1]["id"] = 400
    tokenizer_json.write_text(json.dumps(fields))
    assert "'<|eot_id|>' has the id 400" in refusal(tokenizer_json)


def test_a_file_that_is_not_what_its_name_says(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"version": "1.0"}')
    assert "has neither `model`" in refusal(path)
    path.write_text('{"model": {"type": "BPE"')
    assert "is not a SentencePiece model, and not JSON: " in refusal(path)
    path.write_bytes(b'{"model": "\xff"}')
    assert "not JSON" in refusal(path)
    path.write_text("[" * 100_000)
    assert "is not a SentencePiece model" in refusal(path)


def test_metas_base64_file_is_refused_by_name(tmp_path):
    lines = [b"%s %d\n" % (base64.b64encode(bytes([byte])), byte) for byte in range(256)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    sentence = refusal(tmp_path)
    assert "in tiktoken's base64 form" in sentence
    assert "tokenizer.json of the same model would work" in sentence


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"eos_token": 7},
            "eos_token in tokenizer_config.json is no text but 7; the text of a token",
        ),
        ({"eos_token": "<end>"}, "eos_token '<end>', which is no control piece; <s>, </s> are"),
        ({"add_bos_token": "yes"}, "add_bos_token='yes'; true or false would work"),
        (
            {"added_tokens_decoder": [1]},
            "added_tokens_decoder in tokenizer_config.json is not of objects",
        ),
        ({"added_tokens_decoder": {"320": {"content": "<|im_end|>"}}}, "adds '<|im_end|>' with id"),
    ],
)
def test_settings_that_do_not_fit_the_model(tmp_path, changes, sentence):
    folder = make_release(tmp_path, "llama2")
    edit_json(folder / "tokenizer_config.json", **changes)
    assert sentence in refusal(folder)


def test_configs_beside_it_that_cannot_be_read(tmp_path):
    folder = make_release(tmp_path, "llama2")
    edit_json(folder / "generation_config.json", eos_token_id="end")
    assert "the config beside it has eos_token_id='end'" in refusal(folder)
    (folder / "generation_config.json").write_text("{")
    assert "generation_config.json is not JSON" in refusal(folder)


def test_an_end_that_a_json_file_leaves_unspecial_is_not_read_in_a_text(tokenizer_json):
    fields = json.loads(tokenizer_json.read_text())
    for token in fields["added_tokens"]:
        token["special"] = False
    tokenizer_json.write_text(json.dumps(fields))
    tokenizer = load_tokenizer(tokenizer_json)
    assert tokenizer.special_tokens == {"<|begin_of_text|>": 312, "<|end_of_text|>": 313}
    assert 313 not in tokenizer.encode("<|end_of_text|>")
    # Other tokens of that kind are text like any piece.
    assert tokenizer.encode("<|eot_id|>") == [319]
    assert tokenizer.decode([319]) == "<|eot_id|>"


def test_spaces_without_end_are_refused_not_fatal(tok_json):
    tokenizer = load_tokenizer(tok_json)
    assert tokenizer.decode(tokenizer.encode(" " * 500_000)) == " " * 500_000
    with pytest.raises(DataError, match=r"1000000 spaces in a row at character 1"):
        tokenizer.encode("x" + " " * 1_000_000)
    with pytest.raises(DataError, match="surrogate pair at character 1"):
        tokenizer.encode("x\ud800")


@pytest.mark.parametrize("family", ["grok2", "llama2", "llama31"])
def test_ids_beyond_the_vocabulary(tmp_path, family):
    tokenizer = load_tokenizer(make_release(tmp_path, family))
    for token_id in (-1, 320):
        with pytest.raises(
            DataError, match=f"token id {token_id} is not among the tokenizer's 320"
        ):
            tokenizer.decode([token_id])


def test_the_complete_file_of_a_folder_is_taken(tmp_path):
    """Folders may hold a tokenizer.model that lacks the tokens added in tokenizer.json."""
    folder = make_release(tmp_path / "both", "llama2")
    make_release(folder, "llama31")
    assert load_tokenizer(folder).bos_id == 312
    (tmp_path / "none").mkdir()
    sentence = refusal(tmp_path / "none")
    assert "a folder without tokenizer.tok.json, tokenizer.json or tokenizer.model" in sentence
