"""The SDC check: a device that computes or holds other bits than its peers is found and named."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from grok import sharding
from grok.config import RunConfig
from grok.config.load import from_dict, to_dict
from grok.data.device_feed import global_batches
from grok.errors import DONE, ConfigError, SilentCorruption
from grok.optim.optimizer import make_optimizer
from grok.train import loop
from grok.train.loop import run_training
from grok.train.run_data import read_data
from grok.train.sdc import SdcCheck, digest, outliers, wrong_positions
from grok.train.state import init_state
from grok.train.step import train_step
from tests.train.lying_chips import (
    BACKWARD,
    FORWARD,
    Fault,
    copied_tensors,
    install,
    marked,
    with_wrong_copy,
)
from tests.train.test_loop import in_folder, steps_of


@pytest.fixture(scope="module")
def config(tiny_run: RunConfig) -> RunConfig:
    model = dataclasses.replace(tiny_run.model, num_layers=1, remat="none")
    mesh = dataclasses.replace(tiny_run.mesh, slice=1, data=4, expert=1, tensor=2)
    train = dataclasses.replace(tiny_run.train, sdc_check="stop")
    return dataclasses.replace(tiny_run, model=model, mesh=mesh, train=train)


def test_a_device_that_lies_is_found_and_named(config: RunConfig):
    m, optimizer = config.mesh, make_optimizer(config)
    mesh = sharding.make_mesh(m.data, m.expert, m.tensor, m.slice)
    with install(), jax.set_mesh(mesh):
        state = init_state(config, optimizer, mesh)
        batches = global_batches(read_data(config).train, mesh, range(2), 1)
        step = jax.jit(functools.partial(train_step, config=config, optimizer=optimizer))
        check = SdcCheck(config.train, mesh)
        for number, batch in enumerate(batches, 1):
            state, _ = step(state, marked(batch, None))
            check.check(number, state, marked(batch, None))
        for device, place in ((5, FORWARD), (2, BACKWARD), (0, FORWARD)):
            with pytest.raises(SilentCorruption, match="at step 3: losses and grad") as caught:
                check.check(3, state, marked(batch, Fault(device, place)))
            # The two devices of a tensor group sum their parts: either may be the one.
            assert f"device {mesh.devices.flat[device].id} of host" in str(caught.value)
            assert str(caught.value).count("device ") == 2
            assert caught.value.exit_code == 65
        for tensor in (copied_tensors(state)[1], copied_tensors(state)[-1]):
            wrong = with_wrong_copy(state, tensor, mesh.devices.flat[6])
            with pytest.raises(SilentCorruption) as caught:
                check.check(4, wrong, marked(batch, None))
            named = f"the copies of {tensor} differ between devices, and this one is wrong: device"
            assert f"{named} {mesh.devices.flat[6].id} of host" in str(caught.value)


@pytest.mark.prove
def test_the_check_changes_no_bit_of_a_run(config: RunConfig, tmp_path):
    plain, checked = (
        with_train(in_folder(config, tmp_path / name), steps=6, **train)
        for name, train in {
            "plain": {"sdc_check": "off"},
            "checked": {"sdc_check": "stop", "sdc_check_every": 2},
        }.items()
    )
    assert run_training(plain) == run_training(checked) == DONE
    for one, other in zip(steps_of(plain).values(), steps_of(checked).values(), strict=True):
        assert (one["loss"], one["grad_norm"]) == (other["loss"], other["grad_norm"])


class Liar(SdcCheck):
    """A check that finds something at these steps, each once."""

    steps: list[int]

    def __init__(self, *_):
        pass

    def check(self, step, state, batch):
        if step in self.steps:
            self.steps.remove(step)
            raise SilentCorruption("device 3 is wrong", step)


@pytest.mark.parametrize(
    ("action", "steps", "ends_at"),
    [("stop", [7], 7), ("rollback", [7], None), ("rollback", [7, 8], 8), ("rollback", [2], 2)],
)
def test_a_run_stops_or_goes_back_once(config, tmp_path, monkeypatch, action, steps, ends_at):
    monkeypatch.setattr(loop, "SdcCheck", Liar)
    monkeypatch.setattr(Liar, "steps", list(steps), raising=False)
    run = with_train(in_folder(config, tmp_path), steps=12, sdc_check=action, sdc_check_every=1)
    run = dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, every=4))
    if ends_at is None:
        assert run_training(run) == DONE
        assert list(steps_of(run)) == list(range(1, 13))
        return
    with pytest.raises(SilentCorruption) as caught:
        run_training(run)
    assert caught.value.step == ends_at


def with_train(config: RunConfig, **train) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))


def test_a_digest_changes_with_every_bit_and_place():
    x = np.arange(8, dtype=np.float32)
    flips = np.packbits(np.eye(8 * x.nbytes, dtype=bool), axis=1).view(np.uint32)
    changed = (x.view(np.uint32) ^ flips).view(np.float32)
    digests = jax.vmap(digest)(jax.numpy.asarray(np.concatenate([x[None], x[None, ::-1], changed])))
    assert len(np.unique(digests)) == 8 * x.nbytes + 2


def test_the_copy_that_differs_from_most_is_the_wrong_one():
    digests_SDET = np.full((1, 4, 1, 2), 7, np.uint32)
    digests_SDET[0, 2, 0, 1] = 9
    assert outliers(digests_SDET, [False] * 4) == ((0, 2, 0, 1),)
    # Sharded over tensor, each shard has copies of its own.
    digests_SDET[..., 0] = 5
    assert outliers(digests_SDET, [False, False, False, True]) == ((0, 2, 0, 1),)
    # Of two copies either may be wrong.
    pair = np.asarray([1, 2], np.uint32).reshape(2, 1, 1, 1)
    assert outliers(pair, [False] * 4) == ((0, 0, 0, 0), (1, 0, 0, 0))
    assert outliers(pair, [True, False, False, False]) == ()


def test_a_third_run_tells_which_of_two_groups_is_wrong():
    def runs(number: int, groups: int, liar: int | None, only_in: int | None = None) -> list:
        """Digests of `number` runs in which group `liar` is wrong, in all or in one."""
        result = []
        for k in range(number):
            rows_G = (np.arange(groups) - k) % groups
            digests = np.stack([rows_G, rows_G], -1).reshape(groups, 1, 1, 2)
            if liar is not None and only_in in (None, k):
                digests[liar] += 100
            result.append(digests)
        return result

    assert wrong_positions(runs(3, 5, None)) == []
    assert wrong_positions(runs(3, 5, 2)) == [(2, 0, 0)]
    assert wrong_positions(runs(3, 3, 0)) == [(0, 0, 0)]
    assert wrong_positions(runs(3, 5, 4, only_in=1)) == [(4, 0, 0)]
    assert sorted(wrong_positions(runs(2, 2, 1))) == [(0, 0, 0), (1, 0, 0)]


def test_what_cannot_be_compared_is_refused(config: RunConfig):
    mesh = sharding.make_mesh(1, 1, 8)
    with pytest.raises(ConfigError, match=r"mesh\.data x mesh\.slice is 1; mesh\.data=2, or"):
        SdcCheck(config.train, mesh)
    data = to_dict(config)
    with pytest.raises(ConfigError, match=r"has no effect with train\.sdc_check=off"):
        from_dict(data, overrides=["train.sdc_check=off", "train.sdc_check_every=7"])
