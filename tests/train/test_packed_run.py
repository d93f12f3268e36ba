"""A run on prepared datasets: what it reports, how it resumes, and when it refuses to."""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from grok import storage
from grok.config import BatchChange, CheckpointConfig, DatasetConfig, RunConfig, TrainConfig
from grok.data.dataset import TokenDataset
from grok.errors import DONE, CheckpointError, DataError
from grok.train.loop import run_training
from grok.train.run_data import read_data
from grok.train.telemetry.metrics_file import read_metrics
from tests.data.fake_documents import FakeDocuments, random_lengths, write_prepared
from tests.emulator import bucket

STEPS = 4


def prepared(folder: Path, config: RunConfig, seed: int) -> str:
    documents = FakeDocuments(random_lengths(60, 90, seed=seed))
    tokens = [documents.tokens(index) % 300 + 4 for index in range(60)]
    model = Path(config.data.tokenizer).read_bytes()
    tokenizer = {"sha256": hashlib.sha256(model).hexdigest(), "vocab_size": 320}
    return write_prepared(folder, tokens, tokenizer=tokenizer)


def with_data(config: RunConfig, **changes) -> RunConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def lines_of(config: RunConfig) -> list[dict]:
    lines = read_metrics(Path(config.folder) / "metrics.jsonl")
    return [
        {key: value for key, value in line.items() if key != "tokens_per_second"}
        for line in lines
        if "event" not in line
    ]


@pytest.fixture(scope="module")
def straight(tiny_run: RunConfig, tmp_path_factory) -> RunConfig:
    """Four steps without a stop, checkpoints at 2 and 4, the last on rows of half the length."""
    folder = tmp_path_factory.mktemp("packed")
    a, b, held_out = (prepared(folder / name, tiny_run, seed) for seed, name in enumerate("abc"))
    config = dataclasses.replace(
        with_data(
            tiny_run,
            train=(),
            validation=(),
            datasets=(DatasetConfig(path=a, weight=0.75), DatasetConfig(path=b, weight=0.25)),
            validation_dataset=held_out,
            batch_schedule=(BatchChange(from_step=3, batch_size=16, sequence_length=16),),
        ),
        folder=str(folder / "run"),
        train=TrainConfig(steps=STEPS, log_every=1),
        checkpoint=CheckpointConfig(every=2),
    )
    assert run_training(config) == DONE
    return config


@pytest.fixture
def halfway(straight: RunConfig, tmp_path) -> RunConfig:
    """The same run, in a folder of its own, as it was after two steps."""
    shutil.copytree(straight.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    return dataclasses.replace(straight, folder=str(tmp_path / "run"))


def test_run_json_names_all_data_with_hashes(straight: RunConfig):
    facts = json.loads((Path(straight.folder) / "run.json").read_text())["data"]
    datasets = [dataset.path for dataset in straight.data.datasets]
    paths = [*datasets, straight.data.validation_dataset]
    assert facts[:3] == [{"dataset": p, "manifest": TokenDataset(p).hash} for p in paths]
    assert [file["file"] for file in facts[3:]] == [straight.data.tokenizer]


def test_tokens_of_each_dataset_are_metrics(straight: RunConfig):
    lines = lines_of(straight)
    a, b = (dataset.path for dataset in straight.data.datasets)
    rows = [(6 * step, 2 * step) for step in range(1, STEPS + 1)]
    seen = [line["tokens_seen"] for line in lines if "loss" in line]
    assert seen == [{a: 32 * rows_a, b: 32 * rows_b} for rows_a, rows_b in rows]
    (validation,) = [line for line in lines if "validation_loss" in line]
    assert 0 < validation["validation_loss"] < 10
    assert 0 < validation["validation_bits_per_byte"] < 10


def test_resumed_every_bit_is_the_same(straight: RunConfig, halfway: RunConfig):
    assert run_training(halfway) == DONE
    assert lines_of(halfway) == lines_of(straight)


def test_with_everything_in_a_bucket_every_bit_is_the_same(straight: RunConfig):
    paths = [*(dataset.path for dataset in straight.data.datasets)]
    paths += [straight.data.validation_dataset, straight.data.tokenizer]
    with bucket():
        there = {path: f"gs://bucket/{number}" for number, path in enumerate(paths)}
        for path, remote in there.items():
            for name in os.listdir(path) if Path(path).is_dir() else [""]:
                storage.copy(Path(path) / name, f"{remote}/{name or Path(path).name}")
        datasets = straight.data.datasets
        config = with_data(
            straight,
            datasets=tuple(DatasetConfig(path=there[d.path], weight=d.weight) for d in datasets),
            validation_dataset=there[straight.data.validation_dataset],
            tokenizer=f"{there[straight.data.tokenizer]}/tokenizer.model",
        )
        config = dataclasses.replace(config, folder="gs://bucket/run")
        assert run_training(config) == DONE
        once = numbers(storage.read_bytes("gs://bucket/run/metrics.jsonl").decode())
        storage.remove("gs://bucket/run/checkpoints/4")
        assert run_training(config) == DONE
        again = numbers(storage.read_bytes("gs://bucket/run/metrics.jsonl").decode())
    assert once == again == numbers((Path(straight.folder) / "metrics.jsonl").read_text())


def numbers(metrics: str) -> list[tuple]:
    """Step and losses of each line, which are all that does not name places or times."""
    lines = map(json.loads, metrics.splitlines())
    names = ("step", "loss", "grad_norm", "validation_loss", "validation_bits_per_byte")
    return [tuple(line.get(name) for name in names) for line in lines if "event" not in line]


def test_changed_data_is_refused_unless_told(halfway: RunConfig, tmp_path):
    first, second = halfway.data.datasets
    changed = tmp_path / "changed"
    shutil.copytree(first.path, changed)
    moved = with_data(halfway, datasets=(DatasetConfig(path=str(changed), weight=0.75), second))
    assert read_data(moved).hashes[0]["hash"] == read_data(halfway).hashes[0]["hash"]
    manifest = json.loads((changed / "manifest.json").read_text())
    (changed / "manifest.json").write_text(json.dumps(manifest | {"licence": "other"}))
    sentence = r"checkpoints/2 was trained on .*/a \(manifest [0-9a-f]{12}\) and .*/changed \(mani"
    with pytest.raises(CheckpointError, match=sentence) as caught:
        run_training(moved)
    assert "data.allow_data_change=true" in str(caught.value)
    assert run_training(with_data(moved, allow_data_change=True)) == DONE


def test_a_dataset_of_another_tokenizer_is_refused(straight: RunConfig, tmp_path):
    other = tmp_path / "dataset"
    shutil.copytree(straight.data.datasets[0].path, other)
    manifest = json.loads((other / "manifest.json").read_text())
    config = with_data(straight, datasets=(DatasetConfig(path=str(other)),))
    manifest["tokenizer"]["vocab_size"] = 400
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"up to 399, but model\.vocab_size=320; .*=400 would work"):
        run_training(config)
    manifest["tokenizer"]["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"tokenizer of SHA-256 000000000000, and data\.tokenizer="):
        run_training(config)
    with pytest.raises(DataError, match=r"none has no manifest\.json"):
        run_training(with_data(straight, datasets=(DatasetConfig(path=str(tmp_path / "none")),)))
