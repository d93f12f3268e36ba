"""Mistakes a newcomer makes with `grok train` and `grok sample`: one sentence, exit code 2."""

import dataclasses
from pathlib import Path

import pytest
from click.testing import CliRunner

from grok.cli.main import main
from grok.cli.train import with_folder
from grok.config.text import to_yaml
from grok.errors import ConfigError


def refusal(*arguments: str) -> str:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def config_file(tiny_run, tmp_path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(dataclasses.replace(tiny_run, folder=str(tmp_path / "run"))))
    return file


def test_training_on_a_file_that_is_not_there(config_file):
    assert "nowhere.txt" in refusal("train", str(config_file), "data.train=[nowhere.txt]")


def test_training_with_a_text_as_tokenizer(config_file, tmp_path):
    (tmp_path / "notes.txt").write_text("not a tokenizer")
    sentence = refusal("train", str(config_file), f"data.tokenizer={tmp_path}/notes.txt")
    assert "notes.txt is not a SentencePiece model" in sentence


def test_training_with_a_vocabulary_smaller_than_the_tokenizer(config_file):
    assert "256" in refusal("train", str(config_file), "model.vocab_size=256")


def test_a_batch_that_cannot_be_split(config_file):
    sentence = refusal("train", str(config_file), "data.batch_size=6")
    assert "data.batch_size=6" in sentence
    assert "data.batch_size=8 would work" in sentence


def test_training_without_data_or_tokenizer_leaves_nothing(config_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    sentence = refusal(
        "train", str(config_file), "folder=''", "data.tokenizer=''", "data.train=[text]"
    )
    make = "`grok data tokenizer text --vocab-size 320 --out text.model` makes one"
    assert make in sentence
    sentence = refusal("train", str(config_file), "folder=''", "data.train=[]")
    assert "a file, folder or pattern as in data.train=[text] would work" in sentence
    assert not list(tmp_path.glob("runs/*"))


def test_several_processes_want_a_folder(tiny_run):
    without = dataclasses.replace(tiny_run, folder="")
    with pytest.raises(ConfigError, match=r"2 processes of the run share .* folder=runs/NAME on"):
        with_folder(without, "grok-10m", 2)
    assert with_folder(without, "grok-10m", 1).folder.startswith("runs/grok-10m-")
    assert with_folder(tiny_run, "grok-10m", 2) == tiny_run


def test_sampling_from_what_is_no_run(tmp_path):
    assert "nor a checkpoint of grok" in refusal("sample", str(tmp_path), "--prompt", "x")


def test_sampling_before_the_first_checkpoint(tiny_run, tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(tiny_run))
    assert "has no finished checkpoint" in refusal("sample", str(tmp_path), "--prompt", "x")


def test_several_answers_to_what_is_typed():
    assert "--n 2 needs --prompt" in refusal("sample", "run", "--n", "2")


def test_a_chat_without_a_template(config_file, tiny_run):
    sample = ("sample", str(config_file.parent), "--chat-template", "grok-1")
    result = CliRunner().invoke(main, sample)
    assert result.exit_code == 2
    assert "--chat-template is of messages; it needs --chat" in result.stderr
