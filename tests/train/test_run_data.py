"""Data of a run: what would train nothing is told before anything runs."""

import dataclasses
import json

import pytest

from grok.config.data import DatasetConfig
from grok.data.prepare.records import RecordFields
from grok.errors import DataError
from grok.train.run_data import read_data
from tests.data.prepared import prepare


def supervised(tiny_run, folder, prompts, packing="best_fit"):
    """A run on completions of one letter that follow these prompts."""
    lines = [json.dumps({"p": prompt, "c": "z"}) + "\n" for prompt in prompts]
    (folder / "rows.jsonl").write_text("".join(lines))
    fields = RecordFields(text=None, prompt="p", completion="c")
    tokenizer = tiny_run.data.tokenizer
    prepare(folder / "data", [str(folder / "rows.jsonl")], tokenizer, fields=fields)
    datasets = (DatasetConfig(path=str(folder / "data")),)
    shape = {"sequence_length": 32, "packing": packing}
    data = dataclasses.replace(tiny_run.data, train=(), datasets=datasets, **shape)
    return dataclasses.replace(tiny_run, data=data)


def test_a_dataset_whose_completions_never_fit_is_refused(tiny_run, tmp_path):
    config = supervised(tiny_run, tmp_path, [f"{n}? " * 100 for n in range(5)])
    with pytest.raises(
        DataError, match=r"data has no token that bears loss in its rows of data.sequence_length=32"
    ):
        read_data(config)


def test_rows_that_train_nothing_are_told(tiny_run, tmp_path):
    prompts = [f"{n}? " * (100 if n % 2 else 1) for n in range(40)]
    (notice,) = read_data(supervised(tiny_run, tmp_path, prompts)).notices
    assert "of its rows of data.sequence_length=32 (data.packing=best_fit) have no token" in notice


def test_completions_that_fit_need_no_word(tiny_run, tmp_path):
    assert read_data(supervised(tiny_run, tmp_path, ["short? "] * 5)).notices == ()
