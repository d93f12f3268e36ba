"""Datasets made with tokenizers of other families: begin, end, special tokens, and identity."""

import dataclasses
import json
from pathlib import Path

import pytest

from grok.config import RunConfig
from grok.data.dataset import TokenDataset
from grok.data.prepare.records import RecordFields
from grok.data.stream_batches import read_stream
from grok.data.tokenizers import encode_prompt, load_tokenizer, start_ids, token_bytes
from grok.errors import DataError
from grok.train.run_data import open_dataset, open_held_out
from tests.data.prepared import prepare, write_lines
from tests.fixtures.tokenizers import NAMES, edit_json, make_release

TEXTS = ["Hello, world!", " leading space", "a <|eot_id|></s><|eos|> b", "caf\u00e9 \U0001f680"]


def with_tokenizer(config: RunConfig, folder: Path) -> RunConfig:
    data = dataclasses.replace(config.data, tokenizer=str(folder))
    return dataclasses.replace(config, data=data)


@pytest.fixture(params=NAMES)
def release(request, tmp_path) -> Path:
    return make_release(tmp_path / "release", request.param)


def test_documents_begin_and_end_as_the_family_does(release, tmp_path):
    tokenizer = load_tokenizer(release)
    manifest = prepare(
        tmp_path / "out", [write_lines(tmp_path / "rows.jsonl", TEXTS)], str(release)
    )
    data = TokenDataset(tmp_path / "out")
    for number, text in enumerate(TEXTS):
        ids = data[number].tokens_S.tolist()
        assert ids == [*encode_prompt(tokenizer, text), tokenizer.eos_id]
        assert tokenizer.decode(ids) == text
    assert manifest["tokenizer"] == {
        "sha256": tokenizer.files.sha256,
        "vocab_size": 320,
        "start_ids": start_ids(tokenizer),
        "eos_id": tokenizer.eos_id,
    }
    stored = load_tokenizer(tmp_path / "out")
    assert (stored.files.sha256, stored.eos_ids) == (tokenizer.files.sha256, tokenizer.eos_ids)
    assert start_ids(stored) == start_ids(tokenizer)


def test_the_bytes_to_predict_are_those_of_the_texts(release, tmp_path, tiny_run):
    tokenizer = load_tokenizer(release)
    prepare(tmp_path / "out", [write_lines(tmp_path / "rows.jsonl", TEXTS)], str(release))
    config = with_tokenizer(tiny_run, release)
    _, num_bytes = open_held_out([], str(tmp_path / "out"), tokenizer, config)
    firsts = [tokenizer.piece_bytes(tokenizer.encode(text)[0], first=True) for text in TEXTS]
    # Behind bos a text's first token is predicted like the others; without it, by nothing.
    unpredicted = 0 if tokenizer.adds_bos else sum(map(len, firsts))
    assert num_bytes == sum(len(text.encode()) for text in TEXTS) - unpredicted


def test_special_tokens_are_read_where_asked(release, tmp_path):
    tokenizer = load_tokenizer(release)
    name = tokenizer.piece(tokenizer.eos_ids[-1])
    rows = write_lines(tmp_path / "rows.jsonl", [f"one{name}two"])
    for allowed in (False, True):
        out = tmp_path / str(allowed)
        prepare(out, [rows], str(release), allow_special_tokens=allowed)
        ids = TokenDataset(out)[0].tokens_S.tolist()
        assert (tokenizer.eos_ids[-1] in ids[:-1]) == allowed


def test_a_completion_goes_on_and_bos_bears_no_loss(release, tmp_path):
    tokenizer = load_tokenizer(release)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"q": "Hi", "a": "there"}) + "\n")
    fields = RecordFields(text=None, prompt="q", completion="a")
    prepare(tmp_path / "out", [str(path)], str(release), fields=fields)
    document = TokenDataset(tmp_path / "out")[0]
    ids = document.tokens_S.tolist()
    assert tokenizer.decode(ids) == "Hithere"
    assert ids[: len(start_ids(tokenizer))] == start_ids(tokenizer)
    completion = tokenizer.encode("there", continues=True)
    num_prompt = len(ids) - len(completion) - 1
    assert document.mask_S.tolist() == [0] * num_prompt + [1] * (len(completion) + 1)


def test_text_files_begin_and_end_alike(release, tmp_path):
    tokenizer = load_tokenizer(release)
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    files = [tmp_path / f"{number}.txt" for number in range(len(TEXTS))]
    stream = read_stream(files, tokenizer, 320)
    ids = [[*encode_prompt(tokenizer, text), tokenizer.eos_id] for text in TEXTS]
    assert stream.tokens_S.tolist() == [i for document in ids for i in document]


def test_other_settings_of_the_same_tokenizer_are_refused(tmp_path, tiny_run):
    release = make_release(tmp_path / "release", "llama31")
    rows = write_lines(tmp_path / "rows.jsonl", TEXTS)
    prepare(tmp_path / "out", [rows], str(release))
    config = with_tokenizer(tiny_run, release)
    open_dataset(str(tmp_path / "out"), load_tokenizer(release), config)
    edit_json(release / "tokenizer_config.json", eos_token="<|eot_id|>")
    with pytest.raises(DataError, match=r"with eos_id=313, and data\.tokenizer=.* has 319"):
        open_dataset(str(tmp_path / "out"), load_tokenizer(release), config)
    with pytest.raises(DataError, match=r"is another dataset \(tokenizer"):
        prepare(tmp_path / "out", [rows], str(release))
    edit_json(release / "tokenizer_config.json", eos_token="<|end_of_text|>", add_bos_token=False)
    with pytest.raises(DataError, match=r"with start_ids=\[312\], and .* has \[\]") as refusal:
        open_dataset(str(tmp_path / "out"), load_tokenizer(release), config)
    # What the refusal offers.
    assert f"data.tokenizer={tmp_path / 'out'}" in str(refusal.value)
    out = tmp_path / "out"
    open_dataset(str(out), load_tokenizer(out), with_tokenizer(tiny_run, out))


def test_without_an_end_there_is_no_dataset(tmp_path):
    release = make_release(tmp_path / "release", "llama31")
    edit_json(release / "tokenizer_config.json", eos_token=None)
    rows = write_lines(tmp_path / "rows.jsonl", TEXTS)
    with pytest.raises(DataError, match="no end-of-sequence"):
        prepare(tmp_path / "out", [rows], str(release))


def test_a_record_of_spaces_without_end_is_a_bad_record(tmp_path):
    release = make_release(tmp_path / "release", "grok2")
    rows = write_lines(tmp_path / "rows.jsonl", ["x" + " " * 1_000_000 + "y", *TEXTS])
    manifest = prepare(tmp_path / "out", [rows], str(release), max_bad_share=0.5)
    assert manifest["counts"]["rejected"] == 1
    reason = json.loads((tmp_path / "out" / "rejected.jsonl").read_text())["reason"]
    assert reason.startswith("has 1000000 spaces in a row at character 1, too long to be split")


def test_bytes_of_every_token(release):
    tokenizer = load_tokenizer(release)
    bytes_V, first_V = token_bytes(tokenizer), token_bytes(tokenizer, first=True)
    assert set((bytes_V - first_V).tolist()) <= {0, 1}
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert first_V[ids[0]] + sum(bytes_V[ids[1:]]) == len(text.encode())
