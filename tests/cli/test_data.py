"""`grok data`: what it prints, what it refuses, and a changed byte that it finds."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from grok.cli.main import main
from grok.data.dataset import TokenDataset
from grok.data.tokenizers import load_tokenizer
from tests.data import prepared
from tests.data.prepared import TEXTS, contents, write_lines


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["data", *map(str, arguments)])
    assert result.exit_code == code, result.output
    if code == 2:
        assert result.stderr.count("\n") == 1 or result.stderr.startswith("Usage")
        return result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("data")
    prepared.make_tokenizer(home)
    write_lines(home / "rows.jsonl", [*TEXTS, TEXTS[0], ""])
    run(*command(home), "--out", home / "out", "--drop-duplicates")
    return home


def command(home: Path) -> list[object]:
    share = ["--max-bad-share", 0.1, "--workers", 1, "--shard-size", "5KB"]
    return ["prepare", home / "rows.jsonl", "--tokenizer", home / "t.model", *share]


def test_preparing_says_what_was_made_and_left_out(home, tmp_path):
    out = tmp_path / "out"
    said = run(*command(home), "--out", out, "--drop-duplicates")
    data = TokenDataset(out)
    assert f"120 documents, {data.lengths.sum():,} tokens of " in said
    assert f"1 bad record left out: {out / 'rejected.jsonl'}" in said
    assert "1 duplicate left out" in said
    assert said.endswith(f"{out}: complete\n")
    assert contents(out) == contents(home / "out")


def test_slow_hashing_of_the_sources_is_no_part_of_the_rate(home, tmp_path, monkeypatch):
    clock = iter([0.0] + [60.0 + 20 * n for n in range(1000)])
    monkeypatch.setattr("grok.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    result = CliRunner().invoke(main, ["data", *map(str, command(home)), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert " MB/s" in result.stderr


def test_too_many_bad_records(home, tmp_path):
    arguments = [*command(home), "--out", tmp_path / "out", "--max-bad-share", 0.001]
    said = run(*arguments, code=2)
    assert said.startswith("error: 1 of 122 records are bad, 0.82%, more than --max-bad-share")
    assert "rows.jsonl:122: is empty" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-field", "p"], "belong together"),
        (["--messages-field", "m", "--text-field", "t"], "exclude each other"),
        (["--shard-size", "much"], "much is no size"),
        (["--chat-template", "grok-1"], "--chat-template is of messages; it needs"),
        (["--chat-date", "2026-01-31"], "--chat-date is of messages; it needs"),
    ],
)
def test_options_that_do_not_go_together(home, tmp_path, arguments, message):
    assert message in run(*command(home), "--out", tmp_path / "out", *arguments, code=2)


def test_inspect_shows_counts_lengths_packing_and_text(home):
    said = run("inspect", home / "out", "--length", 128, "--samples", 3, "--check")
    assert "documents   120" in said
    assert "match the manifest" in said
    assert "at length 128: " in said
    assert said.count('"source": 0') == 3
    assert json.dumps(TEXTS[40][:20])[:-1] in said


def test_inspect_as_json(home):
    found = json.loads(run("inspect", home / "out", "--length", 64, "--samples", 1, "--json"))
    lengths = TokenDataset(home / "out").lengths
    assert sum(bin["documents"] for bin in found["histogram"]) == len(lengths)
    for bin in found["histogram"]:
        inside = lengths[(lengths >= bin["low"]) & (lengths <= bin["high"])]
        assert (bin["documents"], bin["tokens"]) == (len(inside), inside.sum())
    assert 0.9 < found["efficiency"]["concat_then_split"] <= 1
    assert 0.5 < found["efficiency"]["best_fit"] <= 1
    assert found["problems"] == []
    assert found["hash"] == TokenDataset(home / "out").hash


@pytest.mark.parametrize("name", ["shard-00002", "lengths.npy", "tokenizer.model"])
def test_inspect_names_the_file_with_a_changed_byte(home, tmp_path, name):
    shutil.copytree(home / "out", tmp_path / "out")
    (path,) = (tmp_path / "out").glob(f"{name}*")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    said = run("inspect", tmp_path / "out", "--check", code=1)
    assert f"{path.name} does not match its manifest" in said
    path.unlink()
    if name != "lengths.npy":
        assert f"{path.name} is missing" in run("inspect", tmp_path / "out", "--check", code=1)


def test_inspecting_what_is_no_dataset(tmp_path):
    assert "has no manifest.json" in run("inspect", tmp_path, code=2)


def test_training_a_tokenizer_with_pieces_of_ones_own(home, tmp_path):
    out = tmp_path / "new.model"
    arguments = ["--out", out, "--vocab-size", 384, "--special", "<|a|>", "--special", "<|b|>"]
    assert "384 pieces" in run("tokenizer", home / "sample.txt", *arguments)
    trained = load_tokenizer(out)
    ids = trained.encode("x<|a|>y<|b|>")
    assert len(ids) == 4
    assert trained.decode(ids) == "x<|a|>y<|b|>"


def test_checking_a_tokenizer(home):
    model = home / "t.model"
    said = run("tokenizer", "--check", model, "--config", "grok-10m")
    assert "fits grok-10m: 384 pieces" in said
    small = home / "small.yaml"
    small.write_text("extends: grok-10m\nmodel: {vocab_size: 300}\n")
    said = run("tokenizer", "--check", model, "--config", small, code=2)
    assert "model.vocab_size=384 would work" in said


@pytest.mark.parametrize("arguments", [[], ["x.txt"], ["--check", "x"], ["--vocab-size", "9"]])
def test_half_a_tokenizer_command(arguments):
    assert "Usage" in run("tokenizer", *arguments, code=2)


def test_a_tilde_that_the_shell_left_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("The number one. " * 20)
    words = ["data", "tokenizer", "~/a.txt", "--out=~/t.model", "--vocab-size", "280"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "t.model").exists() and not (tmp_path / "~").exists()
    done = CliRunner().invoke(main, ["data", "inspect", "~nobody-here/data"])
    assert done.exit_code == 2
    assert "./~nobody-here/data would be a name here" in done.output
