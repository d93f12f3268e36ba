"""A run as its user sees it: files, resuming, stopping, refusals."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from grok import sharding, storage
from grok.checkpoint.manager import MODEL, OPTIMIZER, Checkpoints
from grok.config import CheckpointConfig, MeshConfig, RopeConfig, RunConfig, TrainConfig
from grok.config.text import to_yaml
from grok.errors import DONE, SAVED, CheckpointError, ConfigError, DataError
from grok.optim.offload import is_on_host
from grok.optim.optimizer import make_optimizer
from grok.train.loop import StartOptions, run_training
from grok.train.state import abstract_state
from grok.train.telemetry.event_log import read_events
from grok.train.telemetry.metrics_file import MetricsFile, read_metrics
from tests.emulator import bucket
from tests.fixtures.prove import in_suite


def in_folder(config: RunConfig, folder: Path | str) -> RunConfig:
    return dataclasses.replace(config, folder=str(folder))


def saved_state(config: RunConfig, step: int) -> dict:
    """Everything saved at `step`, by name, as NumPy arrays."""
    mesh = sharding.make_mesh(data=2, expert=2, tensor=2)
    optimizer = make_optimizer(config)
    abstract = abstract_state(config, optimizer, mesh)
    checkpoints = Checkpoints(Path(config.folder) / "checkpoints")
    trees = {MODEL: abstract.model, OPTIMIZER: (abstract.step, abstract.opt_state, abstract.guard)}
    read = checkpoints.restore(step, trees)
    checkpoints.close()
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(read)[0]
    }


def steps_of(config: RunConfig) -> dict[int, dict]:
    """Lines of training steps, without what depends on the clock."""
    lines = read_metrics(Path(config.folder) / "metrics.jsonl")
    return {
        line["step"]: {key: line[key] for key in line if key != "tokens_per_second"}
        for line in lines
        if "loss" in line
    }


@pytest.fixture(scope="module")
def straight(tiny_run: RunConfig, tmp_path_factory) -> RunConfig:
    """Twenty steps without a stop, checkpoints at 10 and 20."""
    config = in_folder(tiny_run, tmp_path_factory.mktemp("straight") / "run")
    domains = (*config.data.validation, *config.data.train)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, domains=domains))
    assert run_training(config) == DONE
    return config


def test_a_run_learns_and_leaves_what_it_promises(straight: RunConfig):
    folder = Path(straight.folder)
    lines = read_metrics(folder / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 1
    (validation,) = [line for line in lines if "validation_loss" in line]
    assert validation["step"] == 20
    assert 0 < validation["validation_bits_per_byte"] < 8
    for metric in ("validation_loss", "validation_bits_per_byte"):
        assert validation[f"{metric}/held_out"] == validation[metric]
        assert 0 < validation[f"{metric}/{Path(straight.data.train[0]).stem}"] < 8
    assert {"grad_norm", "learning_rate", "expert_load"} <= lines[0].keys()
    assert sum(lines[0]["expert_load"]) == pytest.approx(1, abs=1e-5)
    assert (folder / "config.yaml").read_text() == to_yaml(straight)
    assert (folder / "tokenizer.model").read_bytes() == Path(straight.data.tokenizer).read_bytes()


def test_resumed_from_the_middle_every_bit_is_the_same(straight: RunConfig, tmp_path):
    assert_resumes_bit_for_bit(straight, tmp_path)


@pytest.mark.prove
@pytest.mark.parametrize("matmul_dtype", ["int8", "float8"])
def test_so_it_is_with_products_in_8_bits(tiny_run: RunConfig, tmp_path, matmul_dtype):
    model = dataclasses.replace(tiny_run.model, matmul_dtype=matmul_dtype)
    config = dataclasses.replace(in_folder(tiny_run, tmp_path / "straight"), model=model)
    assert run_training(config) == DONE
    losses = [line["loss"] for line in steps_of(config).values()]
    assert losses[-1] < losses[0] - 1
    assert_resumes_bit_for_bit(config, tmp_path)


def assert_resumes_bit_for_bit(straight: RunConfig, tmp_path: Path) -> None:
    """A copy of the run goes on from step 10 as the run did."""
    resumed = in_folder(straight, tmp_path / "run")
    shutil.copytree(straight.folder, resumed.folder)
    # As after a crash in step 13: no later checkpoint, but lines that are about to be done again.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines[:13]) + '{"step": 14, "lo')
    assert run_training(resumed) == DONE
    assert steps_of(resumed) == steps_of(straight)
    once, again = saved_state(straight, 20), saved_state(resumed, 20)
    assert once.keys() == again.keys()
    for name in once:
        np.testing.assert_array_equal(once[name], again[name], err_msg=name)


def test_moments_on_the_hosts_change_no_bit(straight: RunConfig, tmp_path):
    """Resumed with them there, and what was saved then read by a run without."""
    optimizer = dataclasses.replace(straight.optimizer, offload=True)
    there = dataclasses.replace(in_folder(straight, tmp_path / "run"), optimizer=optimizer)
    abstract = abstract_state(there, make_optimizer(there), sharding.make_mesh(data=8)).opt_state
    assert {is_on_host(leaf) for leaf in jax.tree.leaves(abstract) if leaf.ndim > 1} == {True}
    shutil.copytree(straight.folder, there.folder)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20")
    assert run_training(there) == DONE
    assert steps_of(there) == steps_of(straight)
    here = in_folder(straight, there.folder)
    once, again = saved_state(straight, 20), saved_state(here, 20)
    for name in once:
        np.testing.assert_array_equal(once[name], again[name], err_msg=name)


def test_a_finished_run_started_again_trains_no_further(straight: RunConfig, tmp_path):
    again = in_folder(straight, tmp_path / "run")
    shutil.copytree(straight.folder, again.folder)
    assert run_training(again) == DONE
    assert steps_of(again) == steps_of(straight)


@pytest.mark.parametrize("item", ["model", "optimizer"])
def test_a_bit_of_an_array_sets_the_checkpoint_aside(straight, tmp_path, capsys, item):
    resumed = in_folder(straight, tmp_path / "run")
    shutil.copytree(straight.folder, resumed.folder)
    checkpoints = Path(resumed.folder, "checkpoints")
    files = (checkpoints / "20" / item).glob("*/values/*")
    file = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x40
    file.write_bytes(data)
    assert run_training(resumed) == DONE
    problem = f"cannot be restored ({checkpoints}/20/{item}: tensor "
    assert f"the checkpoint of step 20 {problem}" in "".join(capsys.readouterr())
    assert (checkpoints / "damaged" / "20").is_dir()
    assert steps_of(resumed) == steps_of(straight)
    once, again = saved_state(straight, 20), saved_state(resumed, 20)
    for name in once:
        np.testing.assert_array_equal(once[name], again[name], err_msg=name)


def test_a_checkpoint_goes_on_another_mesh(straight: RunConfig, tmp_path):
    other = dataclasses.replace(
        in_folder(straight, tmp_path / "run"),
        mesh=MeshConfig(data=8, simulated_devices=8),
    )
    shutil.copytree(straight.folder, other.folder)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20")
    assert run_training(other) == DONE
    ours, theirs = steps_of(other), steps_of(straight)
    for step in range(11, 21):
        # Sums over devices are made in another order; ten steps of AdamW spread the difference.
        assert ours[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-4)


def test_another_model_is_refused_by_name(straight: RunConfig, tmp_path):
    other = dataclasses.replace(
        straight,
        model=dataclasses.replace(
            straight.model,
            attention=dataclasses.replace(straight.model.attention, rope=RopeConfig(theta=500.0)),
        ),
    )
    with pytest.raises(
        CheckpointError, match=r"model\.attention\.rope\.theta=10000\.0 .* says 500\.0"
    ):
        run_training(other)


def test_another_learning_rate_is_asked_for(straight: RunConfig, tmp_path, capsys):
    other = dataclasses.replace(
        in_folder(straight, tmp_path / "run"),
        optimizer=dataclasses.replace(straight.optimizer, peak_lr=2e-2),
    )
    shutil.copytree(straight.folder, other.folder)
    with pytest.raises(CheckpointError, match=r"peak_lr=0\.01, .* says 0\.02; --resume goes on"):
        run_training(other)
    assert run_training(other, StartOptions(resume_changed=True)) == DONE
    said = capsys.readouterr().out
    assert f"run folder: {other.folder}" in said
    assert "changed since then: optimizer.peak_lr from 0.01 to 0.02" in said
    # What cannot change is refused as such.
    lion = dataclasses.replace(
        other, optimizer=dataclasses.replace(straight.optimizer, name="lion")
    )
    for resume_changed in (False, True):
        with pytest.raises(CheckpointError, match=r"optimizer\.name=adamw and the config"):
            run_training(lion, StartOptions(resume_changed=resume_changed))


@pytest.mark.parametrize("number", in_suite([signal.SIGTERM, signal.SIGINT], signal.SIGTERM))
def test_asked_to_stop_a_run_saves_and_goes_on_later(tiny_run, straight, tmp_path, number):
    config = dataclasses.replace(
        in_folder(tiny_run, tmp_path / "run"),
        checkpoint=dataclasses.replace(tiny_run.checkpoint, every=1000),
    )
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    command = [sys.executable, "-m", "grok", "train", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 3 "):
                process.send_signal(number)
                break
        rest = process.stdout.read()
    assert process.returncode == SAVED
    assert f"all saved; `grok train {config.folder}` goes on from there" in rest
    assert run_training(config) == DONE
    assert steps_of(config) == steps_of(straight)


def test_metrics_survive_a_line_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    with MetricsFile(path, first_step=1) as file:
        file.write(2, loss=1.25)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.25},
    ]


def test_what_is_missing_is_named(tiny_run: RunConfig, tmp_path):
    config = in_folder(tiny_run, tmp_path / "run")
    without = dataclasses.replace(config, data=dataclasses.replace(config.data, train=()))
    with pytest.raises(DataError, match=r"data\.train names no files"):
        run_training(without)
    without = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=""))
    make = r"data\.tokenizer names no .*`grok data tokenizer \S+ --vocab-size 320 --out text\.m"
    with pytest.raises(DataError, match=make):
        run_training(without)
    mesh = MeshConfig(data=3, expert=1, tensor=1)
    with pytest.raises(ConfigError, match=r"needs 3 devices, and there are 8"):
        run_training(dataclasses.replace(config, mesh=mesh, train=TrainConfig(steps=20)))


def names_in(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def test_a_run_in_a_bucket_is_as_one_on_this_machine(tiny_run, straight, tmp_path):
    with bucket() as client:
        config = in_folder(tiny_run, "gs://bucket/run")
        assert run_training(config) == DONE
        # As after a crash behind step 10: no later checkpoint, and a line that is done again.
        storage.remove("gs://bucket/run/checkpoints/20")
        assert run_training(config) == DONE
        client.get("bucket/run", str(tmp_path / "run"), recursive=True)
    copied = in_folder(tiny_run, tmp_path / "run")
    assert steps_of(copied) == steps_of(straight)
    once, again = saved_state(straight, 20), saved_state(copied, 20)
    for name in once:
        np.testing.assert_array_equal(once[name], again[name], err_msg=name)
    ours, theirs = (
        sorted(path.name for path in Path(c.folder).iterdir()) for c in (copied, straight)
    )
    assert ours == theirs
    events = [line["event"] for line in read_events(tmp_path / "run" / "events.jsonl")]
    assert events.count("began") == events.count("ended") == 2


def test_checkpoints_as_soon_as_the_last_is_saved(tiny_run, tmp_path):
    config = dataclasses.replace(
        in_folder(tiny_run, tmp_path),
        train=dataclasses.replace(tiny_run.train, steps=6),
        checkpoint=CheckpointConfig(every=0, keep=6),
    )
    assert run_training(config) == DONE
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    first, *_, last = checkpoints.steps()
    checkpoints.close()
    assert (first, last) == (1, 6)
