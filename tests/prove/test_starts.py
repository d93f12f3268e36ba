"""Starts of four processes, each as if on a host of its own with an empty disk."""

import dataclasses
import shutil
import signal
import subprocess

import pytest

from grok.config import MeshConfig, RunConfig
from grok.config.text import to_yaml
from grok.errors import DONE, RESTART
from tests.train.several_hosts import Hosts

pytestmark = pytest.mark.prove

MISSES = {"JAX_EXPLAIN_CACHE_MISSES": "true"}


@pytest.fixture
def config(tiny_run: RunConfig, tmp_path) -> RunConfig:
    return dataclasses.replace(
        tiny_run,
        folder=str(tmp_path / "run"),
        mesh=MeshConfig(data=2, expert=2, simulated_devices=4),
        model=dataclasses.replace(tiny_run.model, num_layers=1, remat="none"),
        train=dataclasses.replace(tiny_run.train, steps=4),
    )


def four(config: RunConfig, tmp_path, disk: str, *overrides: str) -> Hosts:
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    environment = {"XDG_CACHE_HOME": str(tmp_path / disk), **MISSES}
    return Hosts([[str(file), *overrides]] * 4, tmp_path / disk / "logs", environment)


def compiled(hosts: Hosts) -> list[int]:
    """Programs that each process found nowhere, and compiled."""
    words = "PERSISTENT COMPILATION CACHE MISS"
    return [hosts.output(number).count(words) for number in range(4)]


def test_a_second_start_with_empty_disks_compiles_nothing(config, tmp_path):
    first = four(config, tmp_path, "first")
    assert first.codes(timeout=300) == [DONE] * 4
    assert min(compiled(first)) > 0
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    second = four(config, tmp_path, "second")
    assert second.codes(timeout=300) == [DONE] * 4
    assert compiled(second) == [0] * 4


LOAD, COMPILE = "making the initial state", "compiling the training step"
# JAX notices a stopped process, too, and ends the others with 134: later than the deadline here.
DEADLINES = ("train.start_timeout_seconds=60", "train.heartbeat_timeout_seconds=600")


@pytest.mark.parametrize(("line", "stopped"), [(LOAD, 2), (COMPILE, 0), (COMPILE, 2)])
def test_one_that_is_stuck_before_the_first_step_ends_all(config, tmp_path, line, stopped):
    hosts = four(config, tmp_path, "disk", *DEADLINES)
    try:
        assert hosts.wait_until(lambda: line in hosts.output(0))
        hosts.processes[stopped].send_signal(signal.SIGSTOP)
        others = [host for number, host in enumerate(hosts.processes) if number != stopped]
        assert [host.wait(timeout=200) for host in others] == [RESTART] * 3
        with pytest.raises(subprocess.TimeoutExpired):
            hosts.processes[stopped].wait(timeout=0)
    finally:
        hosts.kill()
    assert "did not begin within 60 s (train.start_timeout_seconds)" in hosts.output(3)
