"""A run that starts from open weights: what its first loss is, and where its last weights can go.

Letters: B rows, T tokens.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from click.testing import CliRunner

import grok
from grok.checkpoint.manager import Checkpoints
from grok.cli.main import main
from grok.config import CheckpointConfig, OptimizerConfig, RopeConfig, RunConfig, TrainConfig
from grok.errors import DONE, CheckpointError
from grok.train.init_from import initial_weights, open_initial
from grok.train.loop import run_training
from grok.train.loss import eval_step, validate
from grok.train.run_data import read_data
from grok.train.telemetry.metrics_file import read_metrics
from tests.model import golden

RELEASE = golden.FOLDER / "pub_a/ckpt-0"
STEPS = 8


def golden_run(config: RunConfig, folder: Path, init_from: Path, **train) -> RunConfig:
    """A short run of the golden set's model, from weights that must be of it."""
    return dataclasses.replace(
        config,
        model=golden.config("pub_a", "float32"),
        folder=str(folder),
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=2),
        train=TrainConfig(steps=STEPS, log_every=1, init_from=str(init_from), **train),
        checkpoint=CheckpointConfig(every=STEPS),
    )


@pytest.fixture(scope="module")
def tuned(tiny_run: RunConfig, tmp_path_factory) -> RunConfig:
    config = golden_run(tiny_run, tmp_path_factory.mktemp("tuned") / "run", RELEASE)
    assert run_training(config) == DONE
    return config


def losses(config: RunConfig) -> list[float]:
    lines = read_metrics(Path(config.folder) / "metrics.jsonl")
    return [line["loss"] for line in lines if "loss" in line]


def validation_loss(path: Path, config: RunConfig) -> float:
    """Loss of the weights at `path` over the run's validation text, computed as the run does."""
    mesh, data = grok.make_mesh(2, 2, 2), read_data(config)
    model = grok.load(path, config.model, mesh, "float32")
    with jax.set_mesh(mesh):
        losses = validate(jax.jit(eval_step), model, data.validation, data.num_bytes, mesh)
    return losses["validation_loss"]


def test_the_first_loss_is_that_of_the_released_weights_and_falls(tuned: RunConfig):
    batch = read_data(tuned).train.batch(0)
    logits_BTV = grok.load(RELEASE, tuned.model, dtype="float32")(batch["tokens_BT"])
    log_p_BTV = np.asarray(jax.nn.log_softmax(logits_BTV), np.float64)
    targets_BT1 = batch["targets_BT"][:, :, None]
    expected = -np.take_along_axis(log_p_BTV, targets_BT1, axis=-1).mean()
    first, *_, last = losses(tuned)
    print(f"\nfirst loss {first:.6f}, of the release {expected:.6f}; last loss {last:.4f}")
    assert first == pytest.approx(expected, rel=1e-6)
    assert last < first - 0.5


def test_exported_and_imported_again_the_loss_is_the_same(tuned: RunConfig, tmp_path):
    commands = (
        ("export", "hf", tuned.folder, tmp_path / "hf", "--dtype", "float32"),
        ("import", "hf", tmp_path / "hf", tmp_path / "back", "--dtype", "float32"),
    )
    for command in commands:
        done = CliRunner().invoke(main, [str(word) for word in command])
        assert done.exit_code == 0, done.output
    lines = read_metrics(Path(tuned.folder) / "metrics.jsonl")
    (validation_loss_before,) = [
        line["validation_loss"] for line in lines if "validation_loss" in line
    ]
    assert validation_loss(tmp_path / "back", tuned) == validation_loss_before


def test_grok_eval_tells_the_same_loss(tuned: RunConfig):
    mesh = ("mesh.data=2", "mesh.expert=2", "mesh.tensor=2")
    command = ["eval", tuned.folder, *mesh, "--data", tuned.data.validation[0]]
    done = CliRunner().invoke(main, [*command, "--json"])
    assert done.exit_code == 0, done.output
    (evaluated,) = json.loads(done.output)["data"]
    lines = read_metrics(Path(tuned.folder) / "metrics.jsonl")
    (logged,) = [line for line in lines if "validation_loss" in line]
    assert evaluated["loss"] == logged["validation_loss"]
    assert evaluated["bits_per_byte"] == logged["validation_bits_per_byte"]
    assert evaluated["bytes"] == Path(tuned.data.validation[0]).stat().st_size
    table = CliRunner().invoke(main, command).output
    assert f"{evaluated['loss']:.4f}" in table and "bits/byte" in table


def test_what_the_weights_were_stays_in_the_checkpoint(tuned: RunConfig):
    checkpoints = Checkpoints(Path(tuned.folder) / "checkpoints")
    identity = checkpoints.meta(STEPS)["init_from"]
    assert identity == open_initial(str(RELEASE), tuned.model).identity
    assert (identity["path"], identity["format"]) == (str(RELEASE), "xai")
    # A run that goes on needs them no more.
    gone = dataclasses.replace(tuned, train=dataclasses.replace(tuned.train, init_from="gone"))
    assert initial_weights(gone, checkpoints).identity == identity
    checkpoints.close()


def test_weights_of_another_model_are_refused(tuned: RunConfig, tmp_path):
    wider = dataclasses.replace(
        tuned.model,
        attention=dataclasses.replace(tuned.model.attention, rope=RopeConfig(theta=500.0)),
    )
    key = r"attention\.rope\.theta"
    sentence = rf"{key}=10000\.0, and the config says model\.{key}=500\.0; .* would work"
    with pytest.raises(CheckpointError, match=sentence):
        open_initial(tuned.folder, wider)
    with pytest.raises(CheckpointError, match=r"embed_dim=64, and the config says .*=128"):
        open_initial(tuned.folder, dataclasses.replace(tuned.model, embed_dim=128))
    # A release tells only shapes.
    with pytest.raises(CheckpointError, match=r"tensor.*64.*128"):
        open_initial(str(RELEASE), dataclasses.replace(tuned.model, embed_dim=128))
    with pytest.raises(CheckpointError, match=r"none: cannot be read"):
        open_initial(str(tmp_path / "none"), tuned.model)


def test_a_run_in_the_folder_of_an_import_is_refused(tuned: RunConfig, tmp_path):
    command = ["import", "xai", str(RELEASE), str(tmp_path / "run"), "--config", f"{tuned.folder}"]
    command[-1] += "/config.yaml"
    assert CliRunner().invoke(main, command).exit_code == 0
    there = dataclasses.replace(tuned, folder=str(tmp_path / "run"))
    with pytest.raises(CheckpointError, match=r"holds imported weights.*train\.init_from="):
        run_training(there)
