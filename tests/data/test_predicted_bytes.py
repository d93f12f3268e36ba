"""Bytes of what a prepared dataset has to predict: those of its text, as text files have them."""

import json

import numpy as np
import pytest

from grok.data.dataset import TokenDataset
from grok.data.packed_batches import PackedValidation
from grok.data.prepare.records import RecordFields
from grok.data.stream_batches import read_stream
from grok.data.tokenizers import load_tokenizer, token_bytes
from tests.data.prepared import TEXTS, make_tokenizer, prepare, write_lines

HARD = ["½ \u2581 of a naïve café\n\n\tplus 12345", "\N{GRINNING FACE} smiles", " leading space"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def num_bytes(folder, tokenizer: str) -> int:
    validation = PackedValidation(TokenDataset(folder), sequence_length=32, batch_size=8)
    return validation.num_bytes(token_bytes(load_tokenizer(tokenizer)))


def test_a_dataset_has_the_bytes_of_its_text_files(tokenizer, tmp_path):
    texts = TEXTS[:20] + HARD
    files = [tmp_path / f"{number}.txt" for number in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_bytes(text.encode())
    prepare(tmp_path / "out", [write_lines(tmp_path / "all.jsonl", texts)], tokenizer)
    pieces = load_tokenizer(tokenizer)
    all_bytes = read_stream(files, pieces, 384).num_bytes
    assert (
        json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]["bytes"] == all_bytes
    )
    # A text file's first token is predicted from an eos; a document's own is predicted by nothing.
    firsts = sum(len(pieces.piece_bytes(pieces.encode(text)[0], first=True)) for text in texts)
    assert num_bytes(tmp_path / "out", tokenizer) == all_bytes - firsts


def test_what_is_not_to_be_learnt_has_no_bytes(tokenizer, tmp_path):
    lines = [
        {"q": f"What is {i} times 7?", "a": f" It is {7 * i}: naïve, \u2581."} for i in range(9)
    ]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    fields = RecordFields(text=None, prompt="q", completion="a")
    prepare(tmp_path / "out", [str(tmp_path / "all.jsonl")], tokenizer, fields=fields)
    assert num_bytes(tmp_path / "out", tokenizer) == sum(len(line["a"].encode()) for line in lines)


def test_every_token_has_the_bytes_it_adds(tokenizer):
    pieces = load_tokenizer(tokenizer)
    bytes_V = token_bytes(pieces)
    for text in (*TEXTS[:20], *HARD):
        ids = pieces.encode(text)
        assert int(bytes_V[np.array(ids)].sum()) == len(text.encode())
