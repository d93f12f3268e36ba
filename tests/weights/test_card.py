"""What an export tells of itself: origin, licence and training in the model card, and the files by
which other programs split texts, chat and stop as this one does."""

import json

import pytest

from grok.config.load import to_dict
from grok.data.chat.encoder import ChatEncoder
from grok.data.chat.template import built_in
from grok.data.tokenizers import load_tokenizer
from grok.data.tokenizers.hub_files import hub_files
from grok.data.tokenizers.sentencepiece import train_tokenizer
from grok.weights.huggingface.adapters.grok_1 import GROK_1
from grok.weights.huggingface.card import model_card
from grok.weights.provenance import provenance
from tests.fixtures.random_weights import RandomSource
from tests.fixtures.tokenizers import make_release
from tests.weights.test_huggingface_export import TINY


def source(**meta) -> RandomSource:
    weights = RandomSource(TINY, dtype="float32")
    weights.meta = meta
    return weights


def test_a_run_from_random_weights(tiny_run):
    weights = source(
        config=to_dict(tiny_run),
        data=[{"path": "gs://bucket/books", "hash": "1f"}],
        metrics={"validation_loss": 2.5},
    )
    weights.step = "/home/me/runs/x/checkpoints/350"
    card = model_card(weights, GROK_1, "float32", provenance(weights), licence="mit")
    assert "license: mit\n" in card
    assert "mit, as stated by who exported these weights." in card
    assert "None: trained from random weights." in card
    assert "350 steps by the grok codebase." in card
    assert "`gs://bucket/books` (manifest `1f`)" in card
    assert "| validation_loss | 2.5 |" in card
    assert "No data manifest" not in card
    # Folders of whoever trained it are nobody's business.
    assert "/home/me" not in card
    assert str(tiny_run.folder) not in card
    assert "base_model" not in card
    assert "license" not in model_card(weights, GROK_1, "float32", provenance(weights))


@pytest.mark.parametrize(
    ("path", "repository", "licence"),
    [
        ("hf://xai-org/grok-1@main", "xai-org/grok-1", "apache-2.0"),
        ("hf://mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-v0.1", "apache-2.0"),
        ("hf://meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B", "llama3"),
        ("hf://meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B", "llama3.1"),
        ("hf://xai-org/grok-2", "xai-org/grok-2", "other"),
        ("hf://someone/else", "someone/else", None),
        ("/data/ckpt-0", None, None),
    ],
)
def test_licence_and_base_by_origin(tiny_run, path, repository, licence):
    started = {"path": path, "format": "xai", "checksum": "c0ffee"}
    weights = source(config=to_dict(tiny_run), data=[], init_from=started)
    origin = provenance(weights)
    assert (origin.repository, origin.licence) == (repository, licence)
    assert "checksum of a sample of its values `c0ffee`" in origin.base
    card = model_card(weights, GROK_1, "float32", origin)
    assert (f"base_model: {repository}" in card) == (repository is not None)
    assert (f"license: {licence}\n" in card) == (licence is not None)
    assert ("license_name: grok-2-community" in card) == (licence == "other")


def test_files_that_make_others_split_chat_and_stop_alike(tmp_path):
    (tmp_path / "text.txt").write_text("Some words to learn from, 1 2 3.\n" * 40)
    special = ("<|separator|>",)
    own = train_tokenizer([tmp_path / "text.txt"], tmp_path / "tokenizer.model", 300, special)
    template = built_in("grok-1")
    ends = ChatEncoder(template, own).answers.end_ids
    contents = hub_files(own, 512, template.text, ends)
    settings = json.loads(contents["tokenizer_config.json"])
    assert settings["tokenizer_class"] == "LlamaTokenizer"
    assert (settings["add_prefix_space"], settings["add_bos_token"]) == (False, False)
    assert (settings["eos_token"], settings["unk_token"]) == ("</s>", "<unk>")
    generation = json.loads(contents["generation_config.json"])
    separator = own.encode("<|separator|>")
    assert generation["eos_token_id"] == [own.eos_id, *separator]
    assert contents["chat_template.jinja"].decode() == template.text
    # Read again, it is the same tokenizer.
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    again = load_tokenizer(tmp_path)
    for text in ("Some words", "  learn 12\n\n", "x <|separator|>y"):
        assert again.encode(text, allow_special=True) == own.encode(text, allow_special=True)
    assert (again.adds_bos, again.bos_id, again.eos_id) == (own.adds_bos, own.bos_id, own.eos_id)


@pytest.mark.parametrize("family", ["llama31", "mixtral", "grok2"])
def test_files_of_a_release_stay_as_they_are(tmp_path, family):
    tokenizer = load_tokenizer(make_release(tmp_path, family))
    contents = hub_files(tokenizer, 512)
    before = tokenizer.files.contents()
    assert {name: contents[name] for name in before if "generation" not in name} == {
        name: before[name] for name in before if "generation" not in name
    }
    assert "chat_template.jinja" not in contents
