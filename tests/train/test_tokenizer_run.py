"""A run with a tokenizer.json: its folder has what sampling, evaluation and export need."""

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from grok.cli.main import main
from grok.config import CheckpointConfig, RunConfig, TrainConfig
from grok.config.load import load_config
from grok.data.tokenizers import load_tokenizer
from grok.errors import DONE
from grok.train.loop import run_training
from tests.fixtures.tokenizers import edit_json, make_release

FILES = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}


@pytest.fixture(scope="module")
def finished(tiny_run: RunConfig, tmp_path_factory) -> RunConfig:
    folder = tmp_path_factory.mktemp("llama")
    release = make_release(folder / "release", "llama31")
    edit_json(release / "config.json", eos_token_id=[313, 319])
    config = dataclasses.replace(
        tiny_run,
        folder=str(folder / "run"),
        data=dataclasses.replace(tiny_run.data, tokenizer=str(release)),
        train=TrainConfig(steps=3, log_every=1),
        checkpoint=CheckpointConfig(every=3),
    )
    assert run_training(config) == DONE
    return config


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_folder_has_the_tokenizer(finished: RunConfig):
    folder = Path(finished.folder)
    assert {path.name for path in folder.iterdir()} >= FILES
    copy, original = load_tokenizer(folder), load_tokenizer(finished.data.tokenizer)
    assert copy.eos_ids == original.eos_ids == (313, 319)
    assert copy.encode("caf\u00e9 <|eot_id|>") == original.encode("caf\u00e9 <|eot_id|>")
    assert copy.adds_bos
    sources = json.loads((folder / "run.json").read_text())["data"]
    assert sources[-1]["sha256"] == original.files.sha256


def test_sample_eval_and_export_find_it(finished: RunConfig, tmp_path):
    prompt = "The number"
    options = ["--max-tokens", "2", "--temperature", "0"]
    assert prompt in invoke("sample", finished.folder, "--prompt", prompt, *options)
    measured = invoke(
        "eval", finished.folder, "--data", finished.data.validation[0], "--json",
        "data.batch_size=8", "data.sequence_length=32",
    )  # fmt: skip
    (loss,) = json.loads(measured.splitlines()[-1])["data"]
    assert loss["bytes"] == len(Path(finished.data.validation[0]).read_bytes())
    invoke("export", "params", finished.folder, tmp_path / "params")
    assert {path.name for path in (tmp_path / "params").iterdir()} >= FILES
    run = load_config(tmp_path / "params" / "config.yaml")
    assert load_tokenizer(run.data.tokenizer).eos_ids == (313, 319)


def test_a_hugging_face_folder_carries_it_out_and_in(finished: RunConfig, tmp_path):
    invoke("export", "hf", finished.folder, tmp_path / "hf")
    assert {path.name for path in (tmp_path / "hf").iterdir()} >= FILES
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (312, [313, 319])
    assert "`tokenizer.json`" in (tmp_path / "hf" / "README.md").read_text()
    invoke("import", "hf", tmp_path / "hf", tmp_path / "back", "--dtype", "float32")
    run = load_config(tmp_path / "back" / "config.yaml")
    assert run.data.tokenizer == str(tmp_path / "back" / "tokenizer.json")
    back, original = load_tokenizer(run.data.tokenizer), load_tokenizer(finished.data.tokenizer)
    assert (back.eos_ids, back.adds_bos) == (original.eos_ids, original.adds_bos)
    assert back.files.sha256 == original.files.sha256


def test_a_tokenizer_of_another_model_is_refused(finished: RunConfig, tmp_path):
    larger = make_release(tmp_path / "larger", "grok2")
    edit_json(larger / "tokenizer.tok.json", vocab_size=400)
    arguments = [finished.folder, str(tmp_path / "hf"), "--tokenizer", str(larger)]
    result = CliRunner().invoke(main, ["export", "hf", *arguments])
    assert result.exit_code != 0
    sentence = f"{result.output}{result.exception}"
    assert "has 400 pieces, and the model's vocab_size is 320" in sentence
