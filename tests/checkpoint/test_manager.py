"""Checkpoints hold what was put in, wherever it is put back, and say what is wrong with them."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

import grok
from grok import sharding
from grok.checkpoint.manager import MODEL, OPTIMIZER, Checkpoints
from grok.config import GrokConfig
from grok.errors import CheckpointError


@pytest.fixture(scope="module")
def model(tiny_run):
    return grok.init(tiny_run.model, jax.random.key(0), grok.make_mesh(data=2, expert=2, tensor=2))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoints = Checkpoints(folder, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, {MODEL: model, OPTIMIZER: {"count": np.int32(step)}}, {"step": step})
    checkpoints.close()
    return folder


def wanted(config: GrokConfig, **mesh: int):
    make = lambda: grok.Grok(config, jax.random.key(0))  # noqa: E731
    return sharding.abstract(make, grok.make_mesh(**mesh))


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
    wider = dataclasses.replace(model.config, mlp_dim=128)
    with pytest.raises(CheckpointError, match=r"layers/moe/w_\w+ is \(2, 8, \d+, \d+\) there and"):
        checkpoints.restore(3, {MODEL: wanted(wider, data=8)})
    checkpoints.close()


def test_a_checkpoint_without_its_files_says_so(saved, model, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "3" / "model")
    checkpoints = Checkpoints(tmp_path / "copy")
    with pytest.raises(CheckpointError, match=r"copy/3/model is missing"):
        checkpoints.restore(3, {MODEL: wanted(model.config, data=8)})
    (tmp_path / "copy" / "3" / "meta" / "metadata").write_text("{")
    with pytest.raises(CheckpointError, match=r"copy/3 cannot be read as a checkpoint"):
        checkpoints.meta(3)
    checkpoints.close()
