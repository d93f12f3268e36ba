"""Records of documents, and random access to a prepared dataset."""

import json
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from grok.data.dataset import TokenDataset, decode_document, encode_document
from grok.errors import DataError
from tests.data import prepared


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("documents")
    tokenizer = prepared.make_tokenizer(home)
    source = prepared.write_lines(home / "rows.jsonl", prepared.TEXTS)
    prepared.prepare(home / "out", [source], tokenizer)
    return home


@pytest.mark.parametrize("mask", [None, [0, 1, 1]])
@pytest.mark.parametrize("fields", [{}, {"id": "é", "source": 3}])
def test_a_document_survives_its_record(mask, fields):
    tokens_S = np.array([1, 2**31 - 1, 0])
    document = decode_document(encode_document(tokens_S, mask and np.array(mask), fields))
    np.testing.assert_array_equal(document.tokens_S, tokens_S.astype(np.int32), strict=True)
    assert document.metadata == fields
    assert (document.mask_S is None) == (mask is None)
    if mask is not None:
        np.testing.assert_array_equal(document.mask_S, np.array(mask, np.uint8), strict=True)


def test_the_layout_of_a_record_is_fixed():
    record = encode_document(np.array([7, 258]), np.array([0, 1]), {"source": 0})
    assert record == struct.pack("<IBII", 2, 1, 7, 258) + b'\x00\x01{"source":0}'


@pytest.mark.parametrize("cut", [0, 4, 9, 20, -1])
def test_what_is_no_record_is_refused(cut):
    record = encode_document(np.arange(5), None, {"source": 0})
    with pytest.raises(DataError, match="no document"):
        decode_document(record[:cut])


def test_documents_are_read_in_any_order_by_threads_and_after_a_journey(folder):
    data = TokenDataset(folder / "out")
    assert len(data.manifest["shards"]) > 3
    order = np.random.default_rng(0).permutation(len(data)).tolist()
    with ThreadPoolExecutor(8) as pool:
        tokens_by_number = dict(
            zip(order, pool.map(lambda i: data[i].tokens_S, order), strict=True)
        )
    again = pickle.loads(pickle.dumps(data))
    assert again.hash == data.hash
    for number in range(len(data)):
        assert len(tokens_by_number[number]) == data.lengths[number]
        np.testing.assert_array_equal(tokens_by_number[number], again[number].tokens_S)
    assert prepared.texts_of(data, str(folder / "t.model")) == prepared.TEXTS


def test_a_number_that_is_none_is_refused(folder):
    data = TokenDataset(folder / "out")
    for number in (-1, len(data)):
        with pytest.raises(IndexError):
            data[number]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / "manifest.json").unlink(), r"has no manifest\.json"),
        (lambda out: (out / "manifest.json").write_text("{"), "is not JSON"),
        (lambda out: (out / "manifest.json").write_text("{}"), "is no manifest of"),
        (lambda out: (out / "lengths.npy").unlink(), r"lengths\.npy cannot be read"),
        (lambda out: (out / "lengths.npy").write_bytes(b"x"), r"lengths\.npy cannot be read"),
        (lambda out: np.save(out / "lengths.npy", np.ones(3)), "has 3 documents"),
        (
            lambda out: np.save(out / "lengths.npy", TokenDataset(out).lengths + np.uint32(1)),
            "says tha",
        ),
        (lambda out: shard(out).unlink(), "is missing"),
        (lambda out: shard(out).write_bytes(b""), "is damaged"),
        (lambda out: shard(out).write_bytes(b"x" * 70000), "is damaged"),
        (lambda out: shard(out).write_bytes(shard(out, 1).read_bytes()), "is damaged"),
    ],
)
def test_a_damaged_folder_is_refused_in_a_sentence(folder, tmp_path, damage, message):
    source = prepared.write_lines(tmp_path / "rows.jsonl", prepared.TEXTS)
    out = tmp_path / "out"
    prepared.prepare(out, [source], str(folder / "t.model"))
    damage(out)
    with pytest.raises(DataError, match=message):
        TokenDataset(out)[0]


def shard(out, number=0):
    return sorted(out.glob("shard-*"))[number]


DOCTORED = {
    "outside": (lambda m: m["shards"][0].update(name="../x"), r"shards\[0\].name is '../x'"),
    "a file outside": (lambda m: m["files"].update({"..": "0" * 64}), "the name of a file is '..'"),
    "negative": (lambda m: m["shards"][0].update(documents=-1), r"shards\[0\].documents is -1"),
    "a share": (lambda m: m["counts"].update(tokens=1.5), r"counts.tokens is 1.5"),
    "no number": (lambda m: m["shards"][0].update(bytes="9"), r"shards\[0\].bytes is '9'"),
    "a truth": (lambda m: m["counts"].update(documents=True), r"counts.documents is True"),
    "no list": (lambda m: m.update(shards={}), r"shards is {}"),
    "no shard": (lambda m: m["shards"].append(7), r"shards\[\d+\] is 7"),
    "one more": (lambda m: m["shards"].append(m["shards"][0]), r"has \d+ documents in its shards"),
    "no counts": (lambda m: m.pop("counts"), "counts is None"),
    "no tokenizer": (lambda m: m.update(tokenizer=[]), r"tokenizer is \[\]"),
    "no hash": (lambda m: m["tokenizer"].update(sha256=None), r"tokenizer.sha256 is None"),
}


@pytest.mark.parametrize("change", DOCTORED)
def test_a_doctored_manifest_is_refused_by_its_key(folder, tmp_path, change):
    do, message = DOCTORED[change]
    manifest = json.loads((folder / "out" / "manifest.json").read_text())
    do(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=message):
        TokenDataset(tmp_path)
