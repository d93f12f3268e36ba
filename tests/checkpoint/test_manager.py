"""Checkpoints hold what was put in, wherever it is put back, and say what is wrong with them."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import xxhash

import grok
from grok import sharding
from grok.checkpoint.manager import MODEL, OPTIMIZER, Checkpoints
from grok.checkpoint.retention import RetentionPolicy
from grok.config import ModelConfig
from grok.errors import CheckpointError, SaveError


@pytest.fixture(scope="module")
def model(tiny_run):
    return grok.init(tiny_run.model, jax.random.key(0), grok.make_mesh(data=2, expert=2, tensor=2))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoints = Checkpoints(folder, RetentionPolicy(2))
    for step in (1, 2, 3):
        checkpoints.save(step, {MODEL: model, OPTIMIZER: {"count": np.int32(step)}}, {"step": step})
    checkpoints.close()
    return folder


def wanted(config: ModelConfig, **mesh: int):
    make = lambda: grok.Grok(config, jax.random.key(0))  # noqa: E731
    return sharding.abstract_arrays(make, grok.make_mesh(**mesh))


def test_the_newest_stay(saved):
    checkpoints = Checkpoints(saved)
    assert checkpoints.latest() == 3
    assert checkpoints.meta(2) == {"step": 2}
    checkpoints.close()
    assert sorted(path.name for path in saved.iterdir()) == ["2", "3"]


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 1, "expert": 2, "tensor": 4}])
def test_a_tree_goes_onto_another_mesh_without_the_other_trees(saved, model, mesh):
    checkpoints = Checkpoints(saved)
    target = wanted(model.config, **mesh)
    restored = checkpoints.restore(3, {MODEL: target})[MODEL]
    checkpoints.close()
    for want, have, original in zip(
        *(jax.tree.leaves(tree) for tree in (target, restored, model)), strict=True
    ):
        assert have.sharding == want.sharding
        np.testing.assert_array_equal(have, original)


def test_a_tensor_of_another_shape_is_named(saved, model):
    checkpoints = Checkpoints(saved)
    wider = dataclasses.replace(model.config, moe=dataclasses.replace(model.config.moe, dim=128))
    with pytest.raises(CheckpointError, match=r"layers/moe/w_\w+ is \(2, 8, \d+, \d+\) there and"):
        checkpoints.restore(3, {MODEL: wanted(wider, data=8)})
    checkpoints.close()


def test_a_checkpoint_without_its_files_says_so(saved, model, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "3" / "model")
    checkpoints = Checkpoints(tmp_path / "copy")
    with pytest.raises(CheckpointError, match=r"copy/3/model/_METADATA: cannot be read"):
        checkpoints.restore(3, {MODEL: wanted(model.config, data=8)})
    (tmp_path / "copy" / "3" / "meta" / "metadata").write_text("{")
    with pytest.raises(CheckpointError, match=r"copy/3 cannot be read as a checkpoint"):
        checkpoints.meta(3)
    checkpoints.close()


def retained(policy: RetentionPolicy, steps, metrics) -> set[int]:
    policy.metrics.update(metrics)
    checkpoints = [SimpleNamespace(step=step) for step in steps]
    marks = policy.should_preserve(checkpoints, context=None)
    return {step for step, stays in zip(steps, marks, strict=True) if stays}


def test_which_stay():
    loss = {10: 3.0, 20: 1.0, 30: float("nan"), 40: 2.0, 60: 4.0}
    metrics = {step: {"validation_loss": value} for step, value in loss.items()}
    steps = [10, 20, 30, 40, 50, 60]
    assert retained(RetentionPolicy(2), steps, metrics) == {50, 60}
    assert retained(RetentionPolicy(1, every=30), steps, metrics) == {30, 60}
    assert retained(RetentionPolicy(1, best=2), steps, metrics) == {20, 40, 60}
    assert retained(RetentionPolicy(1, best=2, metric="other"), steps, metrics) == {60}


def tree(step: int) -> dict:
    return {MODEL: {"a": np.random.default_rng(step).random((64, 64)), "b": np.arange(9)}}


def save(folder, keep: RetentionPolicy, losses: dict[int, float]) -> None:
    checkpoints = Checkpoints(folder, keep)
    for step, loss in losses.items():
        checkpoints.save(step, tree(step), {"step": step}, {"validation_loss": loss})
    checkpoints.close()


def steps_in(folder) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def test_the_best_stay_also_when_another_process_saved_them(tmp_path):
    save(tmp_path, RetentionPolicy(1, every=3, best=1), {1: 3.0, 2: 1.0, 3: 2.0})
    save(tmp_path, RetentionPolicy(1, every=3, best=1), {4: 2.5, 5: 2.0})
    assert steps_in(tmp_path) == [2, 3, 5]
    save(tmp_path, RetentionPolicy(1, every=3, best=1), {6: 0.5})
    assert steps_in(tmp_path) == [3, 6]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    save(folder, RetentionPolicy(3), {1: 1.0, 2: 1.0, 3: 1.0})
    return folder


@pytest.fixture
def copy(three, tmp_path):
    return shutil.copytree(three, tmp_path / "copy")


def largest(folder) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=os.path.getsize)


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


def doctor(folder: Path, own: dict | None = None, **changes) -> None:
    """Changes the list of a checkpoint's files, with the checksum that belongs to it."""
    entries = json.loads((folder / "files.json").read_text()) | changes
    entries["files.json"] |= own or {}
    del entries["files.json"]["xxh3_128"]
    checksum = xxhash.xxh3_128_hexdigest(json.dumps(entries).encode())
    entries["files.json"]["xxh3_128"] = checksum
    (folder / "files.json").write_text(json.dumps(entries))


DAMAGE = {
    "truncated": (lambda step: os.truncate(largest(step), 1000), "has 1,000 bytes in model/"),
    "missing": (lambda step: largest(step).unlink(), "lacks the file model/"),
    "a bit of the metadata": (
        lambda step: flip(step / "model" / "_METADATA", 40),
        "has other bytes in model/_METADATA than were saved",
    ),
    "a bit of the step's metadata": (
        lambda step: flip(step / "_CHECKPOINT_METADATA", 40),
        "has other bytes in _CHECKPOINT_METADATA than were saved",
    ),
    "a bit of the list": (
        lambda step: flip(step / "files.json", -40),
        "has other bytes in files.json than were saved",
    ),
    "a bit of the last file": (
        lambda step: flip(step / "commit_success.txt", 8),
        "has other bytes in commit_success.txt than were saved",
    ),
    "no last file": (
        lambda step: (step / "commit_success.txt").unlink(),
        "lacks the file commit_success.txt",
    ),
    "empty": (lambda step: [shutil.rmtree(step), step.mkdir()], "is empty"),
    "no JSON": (lambda step: (step / "files.json").write_text("{"), "has no readable files.json"),
    "other JSON": (
        lambda step: (step / "files.json").write_text('{"model/_METADATA": 1}'),
        "has no readable files.json",
    ),
    "doctored": (lambda step: doctor(step, **{"../x": {"bytes": 1}}), "lacks the file ../x"),
    "negative": (
        lambda step: doctor(step, **{"meta/metadata": {"bytes": -1}}),
        "has 48 bytes in meta/metadata, which was saved with -1",
    ),
    "no numbers": (lambda step: doctor(step, x=1), "has no readable files.json"),
    "no step": (lambda step: doctor(step, {"step": None}), "has no readable files.json"),
    "another's": (
        lambda step: [shutil.rmtree(step), shutil.copytree(step.with_name("1"), step)],
        "is the checkpoint of step 1 under another name",
    ),
    "no list": (lambda step: (step / "files.json").unlink(), "lacks the file files.json, which"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside(copy, damage):
    do, problem = DAMAGE[damage]
    do(copy / "3")
    before = sorted(path.name for path in (copy / "3").rglob("*"))
    checkpoints, told = Checkpoints(copy, RetentionPolicy(3)), []
    assert checkpoints.newest_good(told.append) == checkpoints.latest() == 2
    (sentence,) = told
    assert sentence.startswith(f"the checkpoint of step 3 {problem}")
    assert sentence.endswith(f"; it is now in {copy}/damaged/3")
    assert sorted(path.name for path in (copy / "damaged" / "3").rglob("*")) == before
    # Its step can be saved again, and damaged again.
    checkpoints.save(3, tree(3), {"step": 3})
    checkpoints.close()
    largest(copy / "3").unlink()
    checkpoints = Checkpoints(copy, RetentionPolicy(3))
    assert checkpoints.newest_good(told.append) == 2
    assert told[-1].endswith("damaged/3.2")
    checkpoints.close()


def test_a_checkpoint_of_another_version_is_refused_and_stays(copy):
    (copy / "3" / "files.json").write_text('{"meta/metadata": {"bytes": 11}}')
    checkpoints = Checkpoints(copy, RetentionPolicy(3))
    with pytest.raises(CheckpointError, match=r"copy/3: was saved by another version of grok, wit"):
        checkpoints.newest_good(print)
    doctor(copy / "2", {"version": 7})
    shutil.rmtree(copy / "3")
    with pytest.raises(
        CheckpointError, match=r"copy/2: .* with version 7 of files.json; it cannot"
    ):
        checkpoints.newest_good(print)
    checkpoints.close()
    assert steps_in(copy) == [1, 2]


def test_a_renamed_checkpoint_is_mentioned(copy):
    (copy / "3").rename(copy / "3.good")
    checkpoints, told = Checkpoints(copy, RetentionPolicy(3)), []
    assert checkpoints.newest_good(told.append) == 2
    name = f"{copy}/3.good is the checkpoint of step 3 under another name"
    assert told == [f"{name}, and is not used"]
    checkpoints.close()


def test_where_none_is_whole_nothing_begins_anew(copy):
    for step in (1, 2, 3):
        os.truncate(largest(copy / str(step)), 10)
    for told in ([], ["nothing more"]):
        checkpoints = Checkpoints(copy, RetentionPolicy(3))
        with pytest.raises(CheckpointError, match="has damaged checkpoints only"):
            checkpoints.newest_good(told.append)
        checkpoints.close()
        assert len(told) in (1, 3)


def test_what_was_not_saved_to_its_end_is_deleted(copy):
    half = shutil.copytree(copy / "3", copy / "4.orbax-checkpoint-tmp")
    checkpoints, told = Checkpoints(copy, RetentionPolicy(3)), []
    assert checkpoints.newest_good(told.append) == 3
    assert told == [f"{half} was not saved to its end, and is deleted"]
    assert not half.exists()
    checkpoints.close()


def test_a_save_that_fails_leaves_the_others(copy, monkeypatch):
    checkpoints = Checkpoints(copy, RetentionPolicy(1))

    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("grok.checkpoint.file_list.commit", full)
        checkpoints.save(4, tree(4), {})
        with pytest.raises(SaveError) as error:
            checkpoints.wait()
    assert str(error.value) == (
        f"the checkpoint of step 4 could not be saved in {copy}: No space left on device. "
        "Those before it are as they were."
    )
    assert checkpoints.latest() == 3
    assert steps_in(copy) == [1, 2, 3]
    # The next one is saved as if nothing had been.
    checkpoints.save(5, tree(5), {})
    checkpoints.wait()
    assert steps_in(copy) == [5]
    checkpoints.close()
