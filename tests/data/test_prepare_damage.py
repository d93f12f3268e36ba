"""Damaged input: each kind is named with its place, and the good records around it survive."""

import gzip
import hashlib
import json
import resource
import signal

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from grok.data.dataset import TokenDataset
from grok.data.prepare.records import RecordFields
from grok.errors import DataError
from tests.data import prepared
from tests.data.prepared import prepare, rejected, texts_of, write_lines

GOOD = [f"Good record {i}." for i in range(20)]
GOOD_LINES = [json.dumps({"text": text}).encode() for text in GOOD]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    return prepared.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"not JSON", "is not JSON: Expecting value at column 1"),
        (b'{"text": "cut off', "is not JSON: Unterminated string starting at column 10"),
        (b'["a list"]', "is no JSON object but a list"),
        (b"null", "is no JSON object but null"),
        (b'{"txt": "other name"}', "has no field `text`"),
        (b'{"text": null}', "field `text` is not text but null"),
        (b'{"text": 17}', "field `text` is not text but a number"),
        (b'{"text": ["a"]}', "field `text` is not text but a list"),
        (b'{"text": "\xff\xfe"}', "is not UTF-8 at byte 10 (0xff)"),
        (b'{"text": ""}', "is empty"),
        (b'{"text": " \\n "}', "is empty"),
        (b'{"text": "half \\ud83d a pair"}', "has half of a surrogate pair at character 5"),
        (b'{"text": "\x01"}', "is not JSON: Invalid control character at column 11"),
        (b'{"a": ' + b"[" * 200_000 + b"}", "is not JSON: nested too deeply"),
        (b'{"text": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit"),
    ],
)
def test_a_bad_line_among_good_ones(tmp_path, tokenizer, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([*GOOD_LINES[:10], b"", line, *GOOD_LINES[10:]]))
    manifest = prepare(tmp_path / "out", [str(path)], tokenizer, max_bad_share=0.05)
    (line,) = rejected(tmp_path / "out")
    assert (line["file"], line["line"]) == (str(path), 12)
    assert line["reason"].startswith(reason)
    assert manifest["counts"]["rejected"] == 1
    assert texts_of(TokenDataset(tmp_path / "out"), tokenizer) == GOOD


def compressed_lines(kind: str) -> bytes:
    data = b"\n".join(GOOD_LINES) + b"\n"
    return gzip.compress(data) if kind == "gz" else zstandard.compress(data)


def flipped(data: bytes, offset: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 0xFF]) + data[offset + 1 :]


def bad_utf8(path) -> None:
    text = pyarrow.array([b"good", b"\xff\xfe", b"good"], pyarrow.binary())
    table = pyarrow.table({"text": text.view(pyarrow.string())})
    parquet.write_table(table, path)


def broken_group(path) -> None:
    table = pyarrow.table({"text": GOOD})
    parquet.write_table(table, path, row_group_size=10, compression="gzip", use_dictionary=False)
    offset = parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = path.read_bytes()
    path.write_bytes(data[: offset + 30] + b"\xff" * 20 + data[offset + 50 :])


FILES = {
    "cut.jsonl.gz": (
        lambda path: path.write_bytes(compressed_lines("gz")[:-20]),
        "the gzip data breaks off before its end",
    ),
    "cut.jsonl.zst": (
        lambda path: path.write_bytes(compressed_lines("zst")[:-20]),
        "the zstd data breaks off before its end",
    ),
    "none.txt.gz": (
        lambda path: path.write_bytes(b"never compressed"),
        "the gzip data is damaged",
    ),
    "none.txt.zst": (
        lambda path: path.write_bytes(b"never compressed"),
        "the zstd data is damaged",
    ),
    "sum.txt.gz": (
        lambda path: path.write_bytes(flipped(compressed_lines("gz"), -6)),
        "the gzip data is damaged",
    ),
    "none.parquet": (
        lambda path: path.write_bytes(b"PAR1 and no more"),
        "the file is no Parquet or damaged",
    ),
    "group.parquet": (broken_group, "the rest of row group 1 is damaged"),
    "utf8.parquet": (bad_utf8, "is not UTF-8 at byte 0 (0xff)"),
    "column.parquet": (
        lambda path: parquet.write_table(pyarrow.table({"other": ["x"]}), path),
        "has no field `text`",
    ),
    "utf8.txt": (lambda path: path.write_bytes(b"caf\xe9"), "is not UTF-8 at byte 3 (0xe9)"),
    "empty.txt": (lambda path: path.write_bytes(b""), "is empty"),
    "binary.txt": (lambda path: path.write_bytes(bytes(range(256))), "is not UTF-8 at byte 128"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_among_good_ones(tmp_path, tokenizer, name):
    first = write_lines(tmp_path / "first.jsonl", GOOD[:10])
    last = write_lines(tmp_path / "last.jsonl", GOOD[10:])
    damage, reason = FILES[name]
    damage(tmp_path / name)
    sources = [first, str(tmp_path / name), last]
    prepare(tmp_path / "out", sources, tokenizer, max_bad_share=0.5)
    (line,) = rejected(tmp_path / "out")
    assert line["file"] == str(tmp_path / name)
    assert line["reason"].startswith(reason)
    texts = texts_of(TokenDataset(tmp_path / "out"), tokenizer)
    assert texts[:10] == GOOD[:10]
    assert texts[-10:] == GOOD[10:]


def test_what_comes_before_a_break_survives(tmp_path, tokenizer):
    texts = [hashlib.sha512(bytes([i])).hexdigest() for i in range(200)]
    path = tmp_path / "rows.jsonl.gz"
    write_lines(tmp_path / "rows.jsonl", texts)
    path.write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes())[:-3000])
    prepare(tmp_path / "out", [str(path)], tokenizer)
    survivors = texts_of(TokenDataset(tmp_path / "out"), tokenizer)
    assert 50 < len(survivors) < 200
    assert survivors == texts[: len(survivors)]
    (line,) = rejected(tmp_path / "out")
    assert line["line"] == len(survivors) + 1


def test_other_row_groups_survive_a_broken_one(tmp_path, tokenizer):
    broken_group(tmp_path / "rows.parquet")
    prepare(tmp_path / "out", [str(tmp_path / "rows.parquet")], tokenizer, max_bad_share=0.5)
    assert texts_of(TokenDataset(tmp_path / "out"), tokenizer) == GOOD[:10]
    assert rejected(tmp_path / "out")[0]["line"] == 11


def test_a_changed_byte_of_a_page_with_a_checksum_is_seen(tmp_path, tokenizer):
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"text": GOOD})
    parquet.write_table(
        table, path, compression="none", use_dictionary=False, write_page_checksum=True
    )
    path.write_bytes(path.read_bytes().replace(b"Good record 3", b"Bad! record 3", 1))
    first = write_lines(tmp_path / "first.jsonl", GOOD)
    prepare(tmp_path / "out", [first, str(path)], tokenizer, max_bad_share=0.5)
    assert texts_of(TokenDataset(tmp_path / "out"), tokenizer) == GOOD
    assert "the rest of row group 0 is damaged" in rejected(tmp_path / "out")[0]["reason"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"p": "question"}, "has no field `c`"),
        ({"p": "question", "c": ""}, "has no text that bears loss"),
        ({"p": ["question"], "c": "answer"}, "field `p` is not text but a list"),
    ],
)
def test_a_bad_prompt_or_completion(tmp_path, tokenizer, record, reason):
    lines = [{"p": "q", "c": "a"}, record, {"p": "", "c": "a"}]
    fields = RecordFields(text=None, prompt="p", completion="c")
    assert reasons(tmp_path, tokenizer, fields, lines) == [reason]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("talk", "field `m` is not a list but text"),
        ([], "has no text that bears loss"),
        (["hello"], "message 0 is no object but text"),
        ([{"role": "user"}], "message 0 has no field `content`"),
        ([{"role": "robot", "content": "hi"}], "message 0 has role `robot`, none of system"),
        ([{"role": "user", "content": "hi"}], "has no text that bears loss"),
    ],
)
def test_a_bad_conversation(tmp_path, tokenizer, messages, reason):
    good = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    fields = RecordFields(text=None, messages="m")
    (problem,) = reasons(tmp_path, tokenizer, fields, [{"m": good}, {"m": messages}, {"m": good}])
    assert problem.startswith(reason)


def reasons(tmp_path, tokenizer, fields, records) -> list[str]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    prepare(tmp_path / "out", [str(path)], tokenizer, fields=fields, max_bad_share=0.5)
    assert len(TokenDataset(tmp_path / "out")) == len(records) - 1
    return [line["reason"] for line in rejected(tmp_path / "out")]


def test_too_many_bad_records_stop_it_and_a_larger_share_goes_on(tmp_path, tokenizer):
    path = write_lines(tmp_path / "rows.jsonl", [*GOOD, ""])
    with pytest.raises(
        DataError,
        match=r"1 of 21 records are bad, 4\.76%, more than --max-bad-share 0\.01 allows .*; the "
        r"first: .*rows\.jsonl:21: is empty\. .* --max-bad-share 0\.05 continues",
    ):
        prepare(tmp_path / "out", [path], tokenizer)
    assert len(rejected(tmp_path / "out")) == 1
    assert not (tmp_path / "out" / "manifest.json").exists()
    prepare(tmp_path / "out", [path], tokenizer, max_bad_share=0.05)
    assert texts_of(TokenDataset(tmp_path / "out"), tokenizer) == GOOD


def test_a_hopeless_job_stops_early(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("grok.data.prepare.job.CHECK_RECORDS", 10)
    path = write_lines(tmp_path / "rows.jsonl", [*GOOD[:5], *[""] * 100])
    with pytest.raises(DataError, match=r"5 of 10 records are bad, 50\.00%"):
        prepare(tmp_path / "out", [path], tokenizer)


@pytest.mark.parametrize(("texts", "message"), [([], "of 0 records"), ([""], "of 1 records")])
def test_nothing_good_is_refused(tmp_path, tokenizer, texts, message):
    path = write_lines(tmp_path / "rows.jsonl", texts)
    with pytest.raises(DataError, match=message):
        prepare(tmp_path / "out", [path], tokenizer, max_bad_share=1.0)


@pytest.fixture
def small_files():
    """No file may grow over 100,000 bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_no_room_to_write(tmp_path, tokenizer, small_files):
    texts = [hashlib.sha512(bytes([i])).hexdigest() for i in range(200)]
    paths = [write_lines(tmp_path / f"rows{i}.jsonl", texts) for i in range(4)]
    with pytest.raises(DataError, match=r"cannot be written: .* the same command continues"):
        prepare(tmp_path / "out", paths, tokenizer, shard_bytes=10**9)


def test_a_tokenizer_that_is_none(tmp_path, tokenizer):
    path = write_lines(tmp_path / "rows.jsonl", GOOD)
    with pytest.raises(DataError, match="is not a SentencePiece model"):
        prepare(tmp_path / "out", [path], path)
