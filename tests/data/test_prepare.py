"""Preparing data: bytes fixed by the input alone, kept fields, duplicates, loss masks, manifest."""

import gzip
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import zstandard
from gcp_storage_emulator.server import create_server
from pyarrow import parquet

from grok import __version__
from grok.data.dataset import TokenDataset
from grok.data.prepare.job import prepare_dataset
from grok.data.prepare.records import RecordFields
from grok.data.tokenizers import load_tokenizer
from grok.errors import DataError
from grok.storage import google_storage
from tests.data import prepared
from tests.data.prepared import TEXTS, contents, prepare, texts_of, write_lines

RELEASE = Path(__file__).parents[3] / "shared/tokenizer/grok-1.model"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    return prepared.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def rows(tmp_path) -> str:
    return write_lines(tmp_path / "rows.jsonl", [*TEXTS, TEXTS[3], "", *TEXTS[50:60], "last"])


def test_bytes_do_not_depend_on_the_number_of_processes(tmp_path, rows, tokenizer, monkeypatch):
    monkeypatch.setattr("grok.data.prepare.job.GROUP_RECORDS", 7)
    others = {"drop_duplicates": True, "max_bad_share": 0.1, "licence": "CC0-1.0"}
    outputs = []
    for workers in (1, 2, 4):
        out = tmp_path / f"out{workers}"
        manifest = prepare(out, [rows], tokenizer, workers=workers, **others)
        assert manifest["counts"]["duplicates"] == 11
        assert manifest["counts"]["rejected"] == 1
        outputs.append(contents(out))
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_every_format_and_compression_gives_the_text(tmp_path, tokenizer, kind, compression):
    texts = TEXTS[:30]
    plain = tmp_path / f"plain.{kind}"
    if kind == "txt":
        texts = ["\n".join(texts)]
        plain.write_text(texts[0])
    elif kind == "jsonl":
        write_lines(plain, texts)
    else:
        parquet.write_table(pyarrow.table({"text": texts}), plain, row_group_size=8)
    data = plain.read_bytes()
    if compression == ".gz":
        # Two streams in a row are one file.
        data = gzip.compress(data[:100], mtime=0) + gzip.compress(data[100:], mtime=0)
    elif compression == ".zst":
        data = zstandard.compress(data[:100]) + zstandard.compress(data[100:])
    path = tmp_path / f"data.{kind}{compression}"
    path.write_bytes(data)
    prepare(tmp_path / "out", [str(path)], tokenizer)
    assert texts_of(TokenDataset(tmp_path / "out"), tokenizer) == texts


def test_a_folder_is_walked_in_order_without_hidden_files(tmp_path, tokenizer):
    root = tmp_path / "text"
    for name in ("b.md", "a/z.md", "a/y.py", ".hidden.md", ".git/x.md", "c.rst"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"text of {name}")
    prepare(tmp_path / "out", [str(root)], tokenizer, patterns=("*.md", "*.rst"), licence="MIT")
    data = TokenDataset(tmp_path / "out")
    names = ["a/z.md", "b.md", "c.rst"]
    assert texts_of(data, tokenizer) == [f"text of {name}" for name in names]
    for number, name in enumerate(names):
        assert data[number].metadata == {"source": 0, "licence": "MIT", "id": f"{root}/{name}"}
    (source,) = data.manifest["sources"]
    assert source["files"] == 3
    lines = (tmp_path / "out" / "sources.jsonl").read_bytes()
    assert source["sha256"] == hashlib.sha256(lines).hexdigest()
    first = json.loads(lines.splitlines()[0])
    assert first["sha256"] == hashlib.sha256(b"text of a/z.md").hexdigest()


def test_kept_fields(tmp_path, tokenizer):
    records = [
        {"text": "one", "key": "x1", "lang": "en", "rights": "MIT"},
        {"text": "two", "key": 7, "lang": None},
        {"text": "three", "key": "half \ud800 a pair"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    fields = RecordFields(id="key", language="lang", licence="rights")
    prepare(tmp_path / "out", [str(path)], tokenizer, fields=fields, licence="CC0-1.0")
    data = TokenDataset(tmp_path / "out")
    assert [data[i].metadata for i in range(3)] == [
        {"source": 0, "licence": "MIT", "id": "x1", "language": "en"},
        {"source": 0, "licence": "CC0-1.0", "id": 7},
        {"source": 0, "licence": "CC0-1.0", "id": "half ? a pair"},
    ]


def test_duplicates_are_dropped_over_shards_the_first_stays(tmp_path, rows, tokenizer):
    share = {"max_bad_share": 0.1}
    prepare(tmp_path / "all", [rows], tokenizer, **share)
    prepare(tmp_path / "once", [rows], tokenizer, drop_duplicates=True, **share)
    survivors = texts_of(TokenDataset(tmp_path / "all"), tokenizer)
    assert survivors == [*TEXTS, TEXTS[3], *TEXTS[50:60], "last"]
    assert texts_of(TokenDataset(tmp_path / "once"), tokenizer) == [*TEXTS, "last"]


def test_only_completions_are_learnt(tmp_path, tokenizer):
    pieces = load_tokenizer(tokenizer)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"q": "Row 1:", "a": " 2 4 6"}) + "\n")
    fields = RecordFields(text=None, prompt="q", completion="a")
    manifest = prepare(tmp_path / "out", [str(path)], tokenizer, fields=fields)
    document = TokenDataset(tmp_path / "out")[0]
    prompt, completion = pieces.encode("Row 1:"), pieces.encode(" 2 4 6")
    assert document.tokens_S.tolist() == [*prompt, *completion, pieces.eos_id]
    assert document.mask_S.tolist() == [0] * len(prompt) + [1] * (len(completion) + 1)
    assert manifest["counts"]["loss_tokens"] == len(completion) + 1


def test_only_what_assistants_say_is_learnt(tmp_path, tokenizer):
    pieces = load_tokenizer(tokenizer)
    roles = ("system", "user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": f"Row {i}"} for i, role in enumerate(roles)]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"talk": messages}) + "\n")
    fields = RecordFields(text=None, messages="talk")
    prepare(tmp_path / "out", [str(path)], tokenizer, fields=fields)
    document = TokenDataset(tmp_path / "out")[0]
    end = "<|separator|>"
    assert pieces.decode(document.tokens_S.tolist()) == (
        f"System: Row 0{end}\n\nHuman: Row 1{end}\n\nAssistant: Row 2{end}\n\n"
        f"Human: Row 3{end}\n\nAssistant: Row 4{end}"
    )
    learnt = document.tokens_S[document.mask_S.astype(bool)]
    assert pieces.decode(learnt.tolist()) == f" Row 2{end} Row 4{end}"
    assert document.tokens_S[-1] == pieces.eos_id and document.mask_S[-1] == 1
    assert np.count_nonzero(document.tokens_S == pieces.encode(end)[-1]) == 5


def test_a_completion_goes_on_without_a_space_of_the_tokenizer(tmp_path):
    if not RELEASE.exists():
        pytest.skip("the release's tokenizer is not beside the repository (shared/tokenizer)")
    pieces = load_tokenizer(RELEASE)
    path = tmp_path / "rows.jsonl"
    pairs = [("def f", "():"), ("Q:", " four"), ("a line", "\n\nnext"), ("x", "\u2581y  z ")]
    path.write_text("".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in pairs))
    fields = RecordFields(text=None, prompt="q", completion="a")
    prepare(tmp_path / "out", [str(path)], str(RELEASE), fields=fields)
    data = TokenDataset(tmp_path / "out")
    for number, (prompt, completion) in enumerate(pairs):
        document = data[number]
        said = pieces.decode(document.tokens_S.tolist())
        assert said == (prompt + completion).replace("\u2581", " ")
        before = int(np.argmax(document.mask_S))
        assert document.tokens_S[:before].tolist() == pieces.encode(prompt)


def test_the_manifest_says_what_was_made_of_what(tmp_path, rows, tokenizer):
    (tmp_path / "two.txt").write_text("A second source, é.")
    sources = [rows, str(tmp_path / "two.txt")]
    manifest = prepare(tmp_path / "out", sources, tokenizer, max_bad_share=0.1)
    out = tmp_path / "out"
    assert manifest == json.loads((out / "manifest.json").read_text())
    data = TokenDataset(out)
    assert manifest["code_version"] == __version__
    model = Path(tokenizer).read_bytes()
    assert manifest["tokenizer"]["sha256"] == hashlib.sha256(model).hexdigest()
    assert [source["name"] for source in manifest["sources"]] == sources
    for source in manifest["sources"]:
        assert source["sha256"] == hashlib.sha256(Path(source["name"]).read_bytes()).hexdigest()
        assert source["file_bytes"] == os.path.getsize(source["name"])
    assert manifest["sources"][1]["counts"]["bytes"] == len("A second source, é.".encode())
    counts = manifest["counts"]
    assert counts["documents"] == len(data) == 133
    assert counts["tokens"] == data.lengths.sum() == counts["loss_tokens"]
    assert counts["rejected"] == 1
    for shard in manifest["shards"]:
        file = out / shard["name"]
        assert hashlib.sha256(file.read_bytes()).hexdigest() == shard["sha256"]
    assert sum(shard["documents"] for shard in manifest["shards"]) == 133
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*(shard["name"] for shard in manifest["shards"]), *manifest["files"], "manifest.json"]
    )


def test_a_document_larger_than_a_shard_has_its_own(tmp_path, tokenizer):
    path = write_lines(tmp_path / "rows.jsonl", ["short", "long " * 2000, "short"])
    manifest = prepare(tmp_path / "out", [path], tokenizer)
    assert [shard["documents"] for shard in manifest["shards"]] == [1, 1, 1]


def test_a_second_time_nothing_is_done(tmp_path, rows, tokenizer):
    first = prepare(tmp_path / "out", [rows], tokenizer, max_bad_share=0.1)
    before = contents(tmp_path / "out")
    assert prepare(tmp_path / "out", [rows], tokenizer, max_bad_share=0.1) == first
    assert contents(tmp_path / "out") == before


def test_a_folder_of_other_data_is_refused(tmp_path, rows, tokenizer):
    prepare(tmp_path / "out", [rows], tokenizer, max_bad_share=0.1)
    with pytest.raises(DataError, match=r"options\.drop_duplicates was false and is true"):
        prepare(tmp_path / "out", [rows], tokenizer, drop_duplicates=True)
    Path(rows).write_text('{"text": "other"}\n')
    with pytest.raises(DataError, match=r"is another dataset \(sources was"):
        prepare(tmp_path / "out", [rows], tokenizer)


def test_a_dataset_inside_its_own_source_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"is inside source .* a folder beside it would work"):
        prepare(tmp_path / "out", [str(tmp_path)], tokenizer)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "no sources were given"),
        (["nowhere.txt"], r"source nowhere\.txt: cannot be read: No such file"),
        (["s3://bucket/x"], "neither on this machine nor at gs://"),
    ],
)
def test_sources_that_are_none_are_refused(tmp_path, tokenizer, sources, message):
    with pytest.raises(DataError, match=message):
        prepare(tmp_path / "out", sources, tokenizer)


def test_progress_ends_with_everything(tmp_path, rows, tokenizer):
    progress = []
    job = prepared.options([rows], tokenizer, max_bad_share=0.1)
    manifest = prepare_dataset(job, tmp_path / "out", lambda *now: progress.append(now))
    share, counts = progress[-1]
    assert share == 1
    assert counts == manifest["counts"]


def test_sources_in_a_bucket(tmp_path, tokenizer, monkeypatch):
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    try:
        port = server._api._httpd.server_port
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        system = google_storage(True)
        system.pipe_file("bucket/text/a.txt", b"first")
        system.pipe_file("bucket/text/.hidden", b"no")
        system.pipe_file("bucket/text/b/rows.jsonl.gz", gzip.compress(b'{"text": "second"}\n'))
        prepare(tmp_path / "out", ["gs://bucket/text"], tokenizer)
        assert texts_of(TokenDataset(tmp_path / "out"), tokenizer) == ["first", "second"]
        prepare(tmp_path / "one", ["gs://bucket/text/a.txt"], tokenizer)
        assert texts_of(TokenDataset(tmp_path / "one"), tokenizer) == ["first"]
        with pytest.raises(
            DataError, match="source gs://bucket/none: cannot be read: No such file"
        ):
            prepare(tmp_path / "none", ["gs://bucket/none"], tokenizer)
    finally:
        server.stop()
