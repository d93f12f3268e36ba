"""Runs that go on with other hosts, meshes and storage: equal losses. Prints its figures with -s.

pytest -n 0 -m prove -s tests/prove/test_other_hosts.py
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from grok import storage
from grok.config.text import to_yaml
from grok.errors import DONE, SAVED
from tests.emulator import bucket
from tests.fixtures.network import free_address

pytestmark = pytest.mark.prove

STEPS, MIDDLE = 12, 6
# Where a run goes on: how many hosts share the eight devices, and the mesh that they make.
TWO_HOSTS = (2, ("mesh.data=2", "mesh.expert=2", "mesh.tensor=2"))
ONE_HOST = (1, ("mesh.data=1", "mesh.expert=4", "mesh.tensor=2"))


@pytest.fixture(scope="module")
def file(tiny_run, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(to_yaml(tiny_run))
    return path


def start(file: Path, folder: str, place: tuple[int, tuple[str, ...]]) -> list[subprocess.Popen]:
    """The processes of a run in `folder`, one for each host, on this machine."""
    hosts, mesh = place
    address = free_address()
    own = (f"folder={folder}", f"train.steps={STEPS}", f"checkpoint.every={MIDDLE}")
    command = [sys.executable, "-m", "grok", "train", str(file), *own, *mesh]
    # What tests set for their own devices would hold for these as well.
    env = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    processes = []
    for number in range(hosts):
        named = {"GROK_COORDINATOR": address, "GROK_NUM_PROCESSES": str(hosts)}
        more = named | {"GROK_PROCESS_ID": str(number)} if hosts > 1 else {}
        processes.append(
            subprocess.Popen(command, env=env | more, stdout=subprocess.PIPE, text=True)
        )
    return processes


def finish(processes: list[subprocess.Popen], code: int = DONE) -> None:
    """Waits until all have left, with `code`."""
    with contextlib.ExitStack() as exits:
        for process in processes:
            exits.enter_context(process)
        said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), said


def losses(folder: str) -> dict[int, float]:
    lines = storage.read_bytes(storage.join(folder, "metrics.jsonl")).decode().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line}


@pytest.mark.parametrize(("before", "after"), [(TWO_HOSTS, ONE_HOST), (ONE_HOST, TWO_HOSTS)])
def test_other_hosts_and_another_mesh(file, tmp_path, before, after):
    finish(start(file, f"{tmp_path}/straight", before))
    shutil.copytree(tmp_path / "straight", tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / str(STEPS))
    finish(start(file, f"{tmp_path}/moved", after))
    straight, moved = losses(f"{tmp_path}/straight"), losses(f"{tmp_path}/moved")
    assert list(moved) == list(range(1, STEPS + 1))
    apart = [abs(moved[step] / straight[step] - 1) for step in moved]
    print(f"\n{before} -> {after}")
    for step, difference in zip(moved, apart, strict=True):
        print(f"step {step:2}  {straight[step]:.7f}  {moved[step]:.7f}  {difference:.1e}")
    # Before the move the lines are the same; after it, sums are made in another order.
    assert not any(apart[:MIDDLE])
    assert apart[MIDDLE] < 1e-6
    np.testing.assert_allclose(apart[MIDDLE:], 0, atol=1e-5)


@pytest.mark.parametrize("place", [ONE_HOST, TWO_HOSTS])
def test_asked_to_stop_in_a_bucket(file, tmp_path, place):
    finish(start(file, f"{tmp_path}/here", place))
    with bucket():
        processes = start(file, "gs://bucket/run", place)
        out = processes[0].stdout
        assert out is not None
        for line in out:
            if line.startswith("step 3 "):
                break
        processes[-1].send_signal(signal.SIGTERM)
        finish(processes, SAVED)
        stopped = max(losses("gs://bucket/run"))
        finish(start(file, "gs://bucket/run", place))
        there = losses("gs://bucket/run")
    print(f"\n{place}: stopped after step {stopped}; the losses are those of a run that was not")
    assert stopped < STEPS
    assert there == losses(f"{tmp_path}/here")
