"""Runs of five families: continued from released files, with adapters, and exported in full."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from grok.cli.main import main
from grok.config import CheckpointConfig, LoraConfig, OptimizerConfig, RunConfig, TrainConfig
from grok.errors import DONE
from grok.train.loop import run_training
from grok.train.telemetry.metrics_file import read_metrics
from grok.weights.detect import open_source
from tests.fixtures.prove import in_suite
from tests.model import families

EXPERTS = {"router_balance", "router_entropy", "expert_load", "expert_load_layers"}


def run_of(tiny_run: RunConfig, family: str, folder: Path, init_from: str, **sections) -> RunConfig:
    return dataclasses.replace(
        tiny_run,
        model=families.config(family),
        folder=str(folder),
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=1),
        train=TrainConfig(steps=3, log_every=1, init_from=init_from),
        checkpoint=CheckpointConfig(every=3),
        **sections,
    )


def lines_of(config: RunConfig) -> list[dict]:
    return [line for line in read_metrics(Path(config.folder) / "metrics.jsonl") if "loss" in line]


def run_command(*words) -> None:
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("family", in_suite(families.TOLERANCE, "grok2"))
def test_a_continued_run_is_exported_and_read_back(tiny_run, tmp_path, family):
    config = run_of(tiny_run, family, tmp_path / "run", str(families.FOLDER / family))
    assert run_training(config) == DONE
    first, *_, last = lines_of(config)
    assert last["loss"] < first["loss"]
    assert EXPERTS & first.keys() == (EXPERTS if config.model.moe else set())
    run_command("export", "hf", config.folder, tmp_path / "hf", "--dtype", "float32")
    ours, back = open_source(config.folder), open_source(tmp_path / "hf")
    assert dataclasses.replace(back.config, remat="full") == dataclasses.replace(
        ours.config, compute_dtype=back.config.compute_dtype, param_dtype=back.config.param_dtype
    )
    for name, tensor in ours.tensors.items():
        np.testing.assert_array_equal(
            ours.read(name, tensor.full_part), back.read(name, tensor.full_part), err_msg=name
        )
    run_command("report", config.folder)
    page = (Path(config.folder) / "report.html").read_text()
    assert ("no experts" in page) == (config.model.moe is None)


@pytest.mark.parametrize("family", in_suite(["grok2", "llama2"], "llama2"))
def test_adapters_on_released_weights(tiny_run, tmp_path, family):
    lora = LoraConfig(rank=2, alpha=4, targets=("query", "gate", "down"))
    path = str(families.FOLDER / family)
    config = run_of(tiny_run, family, tmp_path / "run", path, lora=lora)
    assert run_training(config) == DONE
    assert lines_of(config)[-1]["loss"] < lines_of(config)[0]["loss"]
    # Merged, the adapted matrices differ and no other does.
    merged, base = open_source(config.folder), open_source(path)
    for name, tensor in base.tensors.items():
        arrays = (s.read(name, tensor.full_part).astype(np.float32) for s in (merged, base))
        adapted = any(f"w_{target}_" in name for target in lora.targets)
        assert np.array_equal(*arrays) != adapted, name
