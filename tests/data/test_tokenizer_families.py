"""Tokenizers of Grok-2, Llama, Mistral and Mixtral: golden texts, ends, special tokens, streams."""

import json
import pickle
import random
from pathlib import Path

import pytest
import tokenizers

from grok import storage
from grok.data.tokenizers import (
    StreamDecoder,
    Tokenizer,
    encode_prompt,
    load_tokenizer,
    start_ids,
    token_bytes,
)
from grok.errors import DataError
from tests.emulator import bucket
from tests.fixtures.sentencepiece_model import sentencepiece_model
from tests.fixtures.tokenizers import (
    NAMES,
    converted_sentencepiece,
    edit_json,
    golden,
    make_release,
    pieces,
)

# Goldens that their engine made with special tokens read as such.
READ_SPECIAL = ("grok2", "llama31")


@pytest.fixture(scope="module")
def releases(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("releases")
    for family in NAMES:
        make_release(folder / family, family)
    for prefix in ("normalizer", "metaspace"):
        (folder / prefix).mkdir()
        fields = converted_sentencepiece("llama2", prefix)
        (folder / prefix / "tokenizer.json").write_text(json.dumps(fields))
        edit_json(folder / prefix / "tokenizer_config.json", eos_token="</s>")
    return folder


@pytest.fixture(params=[*NAMES, "normalizer", "metaspace"])
def tokenizer(releases, request) -> Tokenizer:
    return load_tokenizer(releases / request.param)


def without_special(text: str, tokenizer: Tokenizer) -> str:
    for name in tokenizer.special_tokens:
        text = text.replace(name, "")
    return text


@pytest.mark.parametrize("family", NAMES)
def test_golden_texts(releases, family):
    tokenizer, expected = load_tokenizer(releases / family), golden(family)
    assert len(expected["texts"]) > 20
    special = family in READ_SPECIAL
    for case in expected["texts"]:
        text, ids = case["text"], case["ids"]
        assert tokenizer.encode(text, allow_special=special) == ids, text
        decoded = case["decoded"]
        shown = without_special(decoded, tokenizer) if special else decoded
        assert tokenizer.decode(ids) == shown, text
        assert start_ids(tokenizer) + ids == case.get("with_bos", ids), text
    if "chat" in expected:
        chat = expected["chat"]
        assert tokenizer.encode(chat["text"], allow_special=True) == chat["ids"]


@pytest.mark.parametrize("family", NAMES)
def test_begin_and_end_are_the_familys(releases, family):
    tokenizer, expected = load_tokenizer(releases / family), golden(family)
    assert tokenizer.eos_id == tokenizer.eos_ids[0] == expected["eos"]
    assert tokenizer.adds_bos == (expected["bos"] is not None)
    assert start_ids(tokenizer) == ([] if expected["bos"] is None else [expected["bos"]])
    # The configs of these models name ids of another tokenizer's bos and eos, 1 and 2.
    assert tokenizer.eos_ids == ((2, 1) if family == "grok2" else (expected["eos"],))


def test_special_tokens_in_a_text_are_text_unless_asked_for(tokenizer):
    for name, token_id in tokenizer.special_tokens.items():
        text = f"a {name} b"
        ids = tokenizer.encode(text)
        assert token_id not in ids, name
        assert tokenizer.decode(ids) == text
        assert token_id in tokenizer.encode(text, allow_special=True), name
        assert tokenizer.piece_bytes(token_id) == b""
        assert tokenizer.piece(token_id) == name


@pytest.mark.parametrize("seed", range(5))
def test_a_stream_of_any_ids_is_their_decode(tokenizer, seed):
    draw = random.Random(seed)
    ids = [draw.randrange(tokenizer.vocab_size) for _ in range(2000)]
    for length in (1, 2, 3, 2000):
        decoder = StreamDecoder(tokenizer)
        pushed = [decoder.push(i) for i in ids[:length]]
        assert "".join(pushed) + decoder.flush() == tokenizer.decode(ids[:length])


def test_streams_never_show_part_of_a_character(tokenizer):
    text = "na\u00efve \u65e5\u672c \U0001f469\u200d\U0001f680 caf\u00e9"
    decoder = StreamDecoder(tokenizer)
    pushed = [decoder.push(i) for i in tokenizer.encode(text)]
    assert "".join(pushed) == text
    assert "\ufffd" not in "".join(pushed)
    assert decoder.flush() == ""


def test_random_texts_come_back(tokenizer):
    draw = random.Random(1)
    points = [*range(0x20, 0x300), 0x65E5, 0x1F642, 0x200D, 0x0A, 0x09]
    for _ in range(200):
        text = "x" + "".join(chr(draw.choice(points)) for _ in range(draw.randrange(40)))
        assert tokenizer.decode(tokenizer.encode(text)) == text
        inside = tokenizer.encode(text, continues=True)
        assert sum(token_bytes(tokenizer)[inside]) == len(text.encode())


@pytest.mark.parametrize("family", ["llama31", "normalizer", "metaspace"])
def test_a_tokenizer_json_decodes_as_its_library(releases, family):
    tokenizer = load_tokenizer(releases / family)
    library = tokenizers.Tokenizer.from_file(str(releases / family / "tokenizer.json"))
    draw = random.Random(2)
    texts = [case["text"] for case in golden("llama2")["texts"]]
    groups = [library.encode(text).ids for text in [*texts, "  two", "\u00bd <s> x"]]
    if family == "llama31":  # byte fallback shows invalid bytes otherwise
        groups += [[draw.randrange(320) for _ in range(50)] for _ in range(50)]
    for ids in groups:
        assert tokenizer.decode(ids) == library.decode(ids)


@pytest.mark.parametrize("prefix", ["normalizer", "metaspace"])
def test_a_converted_sentencepiece_model_gives_the_same_ids(releases, prefix):
    converted, original = load_tokenizer(releases / prefix), load_tokenizer(releases / "llama2")
    assert converted.eos_ids == original.eos_ids
    assert start_ids(converted) == start_ids(original)
    for case in golden("llama2")["texts"]:
        text = case["text"]
        # Metaspace puts no second space before a text that begins with one.
        if prefix == "normalizer" or not text.startswith(" "):
            assert converted.encode(text) == case["ids"], text
        inside = original.encode(text, continues=True)
        assert converted.encode(text, continues=True) == inside, text


def test_copies_for_other_processes_and_in_other_folders(tokenizer, tmp_path):
    for name, data in tokenizer.files.contents().items():
        (tmp_path / name).write_bytes(data)
    for copy in (pickle.loads(pickle.dumps(tokenizer)), load_tokenizer(tmp_path)):
        for name in ("vocab_size", "pad_id", "bos_id", "eos_ids", "adds_bos", "special_tokens"):
            assert getattr(copy, name) == getattr(tokenizer, name), name
        assert copy.files.sha256 == tokenizer.files.sha256
        text = "The </s> caf\u00e9"
        assert copy.encode(text) == tokenizer.encode(text)


def test_a_list_of_ends(tmp_path):
    folder = make_release(tmp_path, "llama31")
    edit_json(folder / "config.json", eos_token_id=[313, 318, 319], bos_token_id=312)
    assert load_tokenizer(folder).eos_ids == (313, 318, 319)
    # A chat model's own end does not become the end of a document.
    edit_json(folder / "tokenizer_config.json", eos_token="<|eot_id|>")
    assert load_tokenizer(folder).eos_ids == (313, 318, 319)
    # generation_config.json comes before config.json, whose end is among them none the less.
    edit_json(folder / "generation_config.json", eos_token_id=[318, 313])
    assert load_tokenizer(folder).eos_ids == (318, 313, 319)
    edit_json(folder / "generation_config.json", eos_token_id=None)
    edit_json(folder / "config.json", eos_token_id=None)
    assert load_tokenizer(folder).eos_ids == (319,)
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    assert load_tokenizer(folder).eos_ids == ()
    assert load_tokenizer(folder).eos_id == -1


@pytest.mark.parametrize(
    ("settings", "model_type", "adds"),
    [
        ({"add_bos_token": True}, None, True),
        ({"add_bos_token": False, "tokenizer_class": "LlamaTokenizer"}, "llama", False),
        ({"tokenizer_class": "LlamaTokenizerFast"}, None, True),
        ({"bos_token": {"content": "<s>"}}, "llama", False),
        ({}, "mixtral", True),
        ({}, "git", False),
        ({}, None, False),
    ],
)
def test_who_puts_bos_before_a_text(tmp_path, settings, model_type, adds):
    folder = make_release(tmp_path, "mistral")
    (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").unlink()
    if settings:
        edit_json(folder / "tokenizer_config.json", **settings)
    if model_type:
        edit_json(folder / "config.json", model_type=model_type)
    assert load_tokenizer(folder / "tokenizer.model").adds_bos is adds


def test_a_stated_choice_of_bos_counts_more_than_the_post_processor(tmp_path):
    folder = make_release(tmp_path, "llama31")
    edit_json(folder / "tokenizer_config.json", add_bos_token=False)
    assert start_ids(load_tokenizer(folder)) == []


def test_bos_in_a_rendered_chat_is_not_doubled(releases):
    tokenizer = load_tokenizer(releases / "llama31")
    bos = tokenizer.bos_id
    chat = encode_prompt(tokenizer, "<|begin_of_text|>Hi<|eot_id|>", allow_special=True)
    assert chat.count(bos) == 1
    untrusted = encode_prompt(tokenizer, "<|begin_of_text|>Hi")
    assert untrusted.count(bos) == 1
    assert tokenizer.decode(untrusted) == "<|begin_of_text|>Hi"


@pytest.mark.parametrize("legacy", [True, False])
def test_control_pieces_of_mistral_v3(tmp_path, legacy):
    model = sentencepiece_model(pieces("mistral", ("[INST]", "[/INST]")), dummy_prefix=True)
    (tmp_path / "tokenizer.model").write_bytes(model)
    edit_json(tmp_path / "tokenizer_config.json", add_bos_token=True, legacy=legacy)
    tokenizer = load_tokenizer(tmp_path)
    assert set(tokenizer.special_tokens) == {"<s>", "</s>", "[INST]", "[/INST]"}
    ids = tokenizer.encode("[INST]the[/INST]", allow_special=True)
    # Legacy tokenizers write a space after each special token, the others none.
    assert ids == [3, *tokenizer.encode("the", continues=not legacy), 4]
    assert {3, 4}.isdisjoint(tokenizer.encode("[INST] the [/INST]"))


def test_ids_that_no_token_has(tmp_path):
    folder = make_release(tmp_path, "grok2")
    edit_json(folder / "tokenizer.tok.json", vocab_size=330)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == 330
    assert tokenizer.decode([329]) == ""


def test_grok_2s_digits_are_split_one_by_one_and_a_pattern_of_the_file_counts(tmp_path):
    folder = make_release(tmp_path, "grok2")
    fields = json.loads((folder / "tokenizer.tok.json").read_text())
    fields["regular_tokens"].append({"bytes": [0x31, 0x32], "token": 320})
    fields["vocab_size"] = 321
    path = folder / "tokenizer.tok.json"
    path.write_text(json.dumps(fields))
    assert len(load_tokenizer(path).encode("12")) == 2
    path.write_text(json.dumps({**fields, "pat_str": r"\d+|\D+"}))
    assert load_tokenizer(path).encode("12") == [320]


def test_a_folder_and_a_file_in_a_bucket(releases):
    with bucket():
        for path in (releases / "llama31").iterdir():
            storage.write_bytes(f"gs://bucket/llama/{path.name}", path.read_bytes())
        local = load_tokenizer(releases / "llama31")
        for path in ("gs://bucket/llama", "gs://bucket/llama/tokenizer.json"):
            tokenizer = load_tokenizer(path)
            assert (tokenizer.eos_ids, tokenizer.adds_bos) == (local.eos_ids, True)
            assert tokenizer.files.contents() == local.files.contents()
        with pytest.raises(DataError, match="gs://bucket/none: cannot be read: it is a folder"):
            load_tokenizer("gs://bucket/none")
