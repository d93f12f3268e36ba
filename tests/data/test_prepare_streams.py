"""Sound files in unusual form are read, and small files that would become large are not."""

import codecs
import gzip
import io
import json
import re

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from grok.data.dataset import TokenDataset
from grok.data.prepare import sources, streams
from grok.data.prepare.records import RecordFields
from grok.errors import DataError
from tests.data import prepared
from tests.data.prepared import prepare, rejected, texts_of, write_lines

TEXTS = [f"Good record {i}." for i in range(20)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    return prepared.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def zstd(data: bytes, window_log: int = 20) -> bytes:
    """As `zstd --long=WINDOW_LOG` writes from a pipe."""
    parameters = zstandard.ZstdCompressionParameters(
        window_log=window_log, enable_ldm=True, write_content_size=0
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(data) + compressor.flush()


SKIPPABLE = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"index"  # as pzstd writes
FORMS = {
    "window 31.jsonl.zst": zstd(LINES, 31),
    "several.jsonl.zst": zstd(LINES[:200]) + SKIPPABLE + zstd(LINES[200:]) + SKIPPABLE,
    "padded.jsonl.zst": zstd(LINES) + bytes(1000),
    "padded.jsonl.gz": gzip.compress(LINES) + bytes(100_000),
    "several.jsonl.gz": gzip.compress(LINES[:99]) + bytes(7) + gzip.compress(LINES[99:]),
    "mark.jsonl": codecs.BOM_UTF8 + LINES,
    "returns.jsonl": LINES.replace(b"\n", b"\r\n"),
    "no end.jsonl": LINES.rstrip(),
}


@pytest.mark.parametrize("name", FORMS)
def test_sound_files_in_unusual_form(tmp_path, tokenizer, name):
    (tmp_path / name).write_bytes(FORMS[name])
    prepare(tmp_path / "out", [str(tmp_path / name)], tokenizer, max_bad_share=0.0)
    assert texts_of(TokenDataset(tmp_path / "out"), tokenizer) == TEXTS


@pytest.mark.parametrize("name", ["none.jsonl.gz", "none.txt.zst"])
def test_an_empty_compressed_file_is_cut_short(tmp_path, tokenizer, name):
    (tmp_path / name).touch()
    with pytest.raises(DataError, match="data breaks off before its end"):
        prepare(tmp_path / "out", [str(tmp_path / name)], tokenizer)


def test_compressed_data_comes_in_pieces():
    zeros = bytes(100 << 20)
    for compression, data in (("gzip", gzip.compress(zeros, 1)), ("zstd", zstd(zeros))):
        sizes = [len(chunk) for chunk in streams.chunks(io.BytesIO(data), compression)]
        assert sum(sizes) == len(zeros)
    sizes = [len(chunk) for chunk in streams.chunks(io.BytesIO(gzip.compress(zeros, 1)), "gzip")]
    assert max(sizes) <= streams.CHUNK_BYTES


def test_lines_over_many_chunks_are_joined_once():
    chunks = [b"a" * 10, b"b" * 10, b"c\nd", b"\n", b"\ne"]
    assert list(streams.lines(chunks, 100)) == [b"a" * 10 + b"b" * 10 + b"c", b"d", b"", b"e"]
    assert list(streams.lines(chunks, 20)) == [None, b"d", b"", b"e"]


def test_a_record_that_is_too_long_is_bad_and_the_others_are_read(tmp_path, tokenizer):
    long = json.dumps({"text": "long " * 300}).encode() + b"\n"
    two_lines = LINES.index(b"2.") - len(b'{"text": "Good record ')
    first, rest = LINES[:two_lines], LINES[two_lines:]
    (tmp_path / "rows.jsonl.zst").write_bytes(zstd(first + long + rest))
    (tmp_path / "page.txt.gz").write_bytes(gzip.compress(b"long " * 300))
    (tmp_path / "short.txt").write_bytes(b"The end.")
    rows = pyarrow.table({"text": ["short", "long " * 300, "short"]})
    parquet.write_table(rows, tmp_path / "rows.parquet")
    names = ("rows.jsonl.zst", "page.txt.gz", "short.txt", "rows.parquet")
    job = {"max_bad_share": 0.2, "max_record_bytes": 1000}
    prepare(tmp_path / "out", [str(tmp_path / name) for name in names], tokenizer, **job)
    expected = [*TEXTS, "The end.", "short", "short"]
    assert texts_of(TokenDataset(tmp_path / "out"), tokenizer) == expected
    bad = rejected(tmp_path / "out")
    assert [line["line"] for line in bad] == [3, None, 2]
    assert {line["reason"] for line in bad} == {"has more than 1,000 bytes"}


def test_a_value_that_stands_in_many_rows_of_parquet_is_held_once(tmp_path, tokenizer):
    value = pyarrow.array(["long " * 400_000])
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 5000, "int32"), value)
    path = tmp_path / "rows.parquet"
    options = {"store_schema": False, "dictionary_pagesize_limit": 1 << 30}
    parquet.write_table(pyarrow.table({"text": column}), path, compression="zstd", **options)
    before = pyarrow.total_allocated_bytes()
    (file,) = sources.find_files([str(path)])
    for record in sources.read_records([file], ["text"], most_bytes=1_000_000):
        assert record.problem == "has more than 1,000,000 bytes"
        assert pyarrow.total_allocated_bytes() - before < 40_000_000


def test_a_file_that_is_lost_counts_by_its_bytes(tmp_path, tokenizer):
    lines = write_lines(tmp_path / "rows.jsonl", TEXTS * 20)
    page = tmp_path / "page.txt"
    page.write_bytes(b"caf\xe9 " * 1000)
    with pytest.raises(DataError) as refusal:
        prepare(tmp_path / "out", [lines, str(page)], tokenizer)
    assert re.match(
        r"5,000 of 16,000 bytes of the files cannot be read, 31\.25%, more than "
        r"--max-bad-share 0\.01 allows .*page\.txt: is not UTF-8 at byte 3 \(0xe9\)\. The same "
        r"command with --max-bad-share 0\.32 continues\.",
        str(refusal.value),
    )
    manifest = prepare(tmp_path / "out", [lines, str(page)], tokenizer, max_bad_share=0.4)
    assert manifest["counts"]["lost_bytes"] == 5000
    assert manifest["counts"]["rejected"] == 1


def test_documents_with_the_id_of_an_earlier_one_are_counted_over_shards(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    records = [{"text": text, "name": number % 19} for number, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    job = {"fields": RecordFields(id="name"), "shard_bytes": 200}
    with pytest.raises(
        DataError, match=r"1 of 20 records have the id of an earlier one, 5\.00%, more than"
    ):
        prepare(tmp_path / "out", [str(path)], tokenizer, **job)
    manifest = prepare(tmp_path / "out", [str(path)], tokenizer, max_bad_share=0.05, **job)
    assert manifest["counts"]["repeated_ids"] == 1
    assert len(manifest["shards"]) > 1 and manifest["counts"]["documents"] == 20


def test_links_in_a_folder_are_followed_once(tmp_path, tokenizer):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "b [1].txt").write_text("linked")
    folder = tmp_path / "near"
    folder.mkdir()
    (folder / "a.txt").write_text("own")
    (folder / "link").symlink_to(tmp_path / "far")
    (folder / "back").symlink_to(folder)
    prepare(tmp_path / "out", [str(folder)], tokenizer)
    assert texts_of(TokenDataset(tmp_path / "out"), tokenizer) == ["own", "linked"]
    (folder / "broken.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"near: cannot be read: No such file"):
        prepare(tmp_path / "again", [str(folder)], tokenizer)
