"""Numbers that stay bad: how a run ends, and how it goes back and on."""

import dataclasses
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from grok.checkpoint.manager import Checkpoints
from grok.config import CheckpointConfig, RunConfig, TrainConfig
from grok.errors import DIVERGED, DONE, Diverged
from grok.train import loop
from grok.train.bad_steps import batch_number, rollback_step, skip_batches
from grok.train.run_data import read_data
from grok.train.step import train_step
from grok.train.telemetry.event_log import read_events
from grok.train.telemetry.metrics_file import read_metrics

STEPS = 8


def poisoned(bad: range):
    """`read_data` with weights that are NaN in the batches of these numbers."""

    def read(config: RunConfig):
        data = read_data(config)
        batch = data.train.batch

        def maybe_bad(number: int, rows: slice = slice(None)):
            made = batch(number, rows)
            return made | {"mask_BT": made["mask_BT"] * np.nan} if number in bad else made

        data.train.batch = maybe_bad
        return data

    return read


def steps_of(config: RunConfig) -> dict[int, dict]:
    lines = read_metrics(Path(config.folder) / "metrics.jsonl")
    return {line["step"]: line for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def healthy(tiny_run: RunConfig, tmp_path_factory) -> RunConfig:
    """Eight steps without trouble, a checkpoint after every two."""
    config = dataclasses.replace(
        tiny_run,
        folder=str(tmp_path_factory.mktemp("healthy") / "run"),
        model=dataclasses.replace(tiny_run.model, num_layers=1, remat="none"),
        data=dataclasses.replace(tiny_run.data, validation=()),
        train=TrainConfig(steps=STEPS, log_every=1, max_bad_steps=2),
        checkpoint=CheckpointConfig(every=2, keep=10),
    )
    assert loop.run_training(config) == DONE
    return config


@pytest.fixture
def after_two(healthy: RunConfig, tmp_path) -> RunConfig:
    """The same run in a folder of its own, as it was after two steps."""
    shutil.copytree(healthy.folder, tmp_path / "run")
    for step in range(4, STEPS + 1, 2):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    return dataclasses.replace(healthy, folder=str(tmp_path / "run"))


def test_one_bad_step_is_skipped_and_the_save_due_then_waits(after_two, monkeypatch):
    monkeypatch.setattr(loop, "read_data", poisoned(range(3, 4)))
    assert loop.run_training(after_two) == DONE
    assert [step for step, line in steps_of(after_two).items() if line["skipped"]] == [4]
    assert Checkpoints(Path(after_two.folder) / "checkpoints").steps() == [2, 5, 6, 8]


def test_bad_steps_in_a_row_end_the_run_and_name_the_tensors(after_two, monkeypatch):
    monkeypatch.setattr(loop, "read_data", poisoned(range(4, 99)))
    with pytest.raises(Diverged, match=r"the 2 steps up to step 6 were bad .* gradients of embed"):
        loop.run_training(after_two)
    *_, last = read_events(Path(after_two.folder) / "events.jsonl")
    assert (last["event"], last["code"]) == ("ended", DIVERGED)
    assert Checkpoints(Path(after_two.folder) / "checkpoints").steps() == [2, 4]


def test_parameters_that_an_update_spoils_are_not_saved(after_two, monkeypatch):
    """No step after the last is there to notice; the one before is too near to the end."""

    def spoiling(state, batch, **options):
        state, metrics = train_step(state, batch, **options)
        spoil = jnp.where(state.step == STEPS - 1, jnp.nan, 0)
        table_VD = state.model.embed.table_VD
        table_VD[...] = table_VD[...] + spoil
        return state, metrics

    monkeypatch.setattr(loop, "train_step", spoiling)
    with pytest.raises(
        Diverged, match=r"after step 8 these are not finite.*: model/embed/table_VD"
    ) as error:
        loop.run_training(after_two)
    assert (error.value.first, error.value.last) == (STEPS - 1, STEPS)
    *_, last = read_events(Path(after_two.folder) / "events.jsonl")
    assert (last["event"], last["code"]) == ("ended", DIVERGED)
    assert Checkpoints(Path(after_two.folder) / "checkpoints").steps() == [2, 4, 6]


def test_a_run_whose_last_validation_is_not_finite_is_not_done(after_two, monkeypatch):
    monkeypatch.setattr(loop, "validation_losses", lambda *_: {"validation_loss": np.inf})
    with pytest.raises(Diverged, match=r"after step 8 these are not finite.*: validation_loss;"):
        loop.run_training(after_two)
    assert Checkpoints(Path(after_two.folder) / "checkpoints").steps() == [2, 4, 6]


def test_a_run_goes_back_and_leaves_the_bad_batches_out(after_two, healthy, monkeypatch):
    config = dataclasses.replace(
        after_two, train=dataclasses.replace(after_two.train, rollback_on_divergence=True)
    )
    monkeypatch.setattr(loop, "read_data", poisoned(range(5, 7)))
    assert loop.run_training(config) == DONE
    folder = Path(config.folder)
    (rolled_back,) = [line for line in read_events(folder / "events.jsonl") if "reason" in line]
    assert (rolled_back["step"], rolled_back["skipped_batches"]) == (4, [4, 6])
    checkpoints = Checkpoints(folder / "checkpoints")
    assert checkpoints.meta(8)["skipped_batches"] == [[4, 6]]
    # Two checkpoints are made after the return; a run that goes on from the first repeats the rest.
    lines = steps_of(config)
    assert list(lines) == list(range(1, STEPS + 1))
    assert lines[4]["loss"] == steps_of(healthy)[4]["loss"]
    assert lines[5]["loss"] != steps_of(healthy)[5]["loss"]
    assert not any(line["skipped"] for line in lines.values())
    shutil.rmtree(folder / "checkpoints" / "8")
    assert loop.run_training(config) == DONE
    again = steps_of(config)
    assert [again[7]["loss"], again[8]["loss"]] == [lines[7]["loss"], lines[8]["loss"]]


def test_the_loop_refuses_a_batch_that_is_still_on_the_host(after_two, monkeypatch):
    feed = loop.global_batches

    def unfed(*arguments):
        for batch in feed(*arguments):
            yield {name: np.asarray(array) for name, array in batch.items()}

    monkeypatch.setattr(loop, "global_batches", unfed)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        loop.run_training(after_two)


def test_where_to_go_back_to():
    error = Diverged("bad", first=25, last=34)
    assert rollback_step([10, 20, 30], error, began=0, rolled_back=False) == 20
    assert rollback_step([10, 20], error, began=20, rolled_back=False) == 20
    assert rollback_step([10, 20], error, began=20, rolled_back=True) == 10
    assert rollback_step([10, 20], error, began=10, rolled_back=True) == 20
    with pytest.raises(Diverged):
        rollback_step([30], error, began=0, rolled_back=False)
    with pytest.raises(Diverged):
        rollback_step([20], error, began=20, rolled_back=True)


def test_batches_left_out_add_up():
    first = skip_batches((), 20, Diverged("bad", first=25, last=34), ())
    assert first == ((20, 33),)
    assert (batch_number(20, first), batch_number(34, first)) == (34, 48)
    # A second time in trouble, at steps 31 to 40, it goes back to 30 or, too early for that, to 10.
    assert skip_batches(first, 30, Diverged("bad", first=31, last=40), first) == (
        (20, 33),
        (44, 53),
    )
    assert skip_batches((), 10, Diverged("bad", first=31, last=40), first) == ((10, 53),)
