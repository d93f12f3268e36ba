"""Runs of two processes, each as if on a host of its own."""

import dataclasses
import resource
import signal
import time
from pathlib import Path

import pytest

from grok import cluster, distributed
from grok.config import RunConfig
from grok.config.text import to_yaml
from grok.errors import DONE, REFUSED, RESTART, SAVED, ConfigError
from grok.train.loop import run_training
from grok.train.telemetry.event_log import read_events
from grok.train.telemetry.metrics_file import read_metrics
from tests.train.several_hosts import Hosts


def losses(config: RunConfig) -> dict[int, float]:
    lines = read_metrics(Path(config.folder) / "metrics.jsonl")
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture
def config(tiny_run: RunConfig, tmp_path) -> RunConfig:
    return dataclasses.replace(
        tiny_run,
        folder=str(tmp_path / "run"),
        model=dataclasses.replace(tiny_run.model, num_layers=1, remat="none"),
    )


def test_a_signal_to_one_stops_both_and_one_host_goes_on(config: RunConfig, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    straight = dataclasses.replace(config, folder=str(tmp_path / "straight"))
    assert run_training(straight) == DONE
    both = Hosts([[str(file)]] * 2, tmp_path / "logs")
    try:
        assert both.wait_until(lambda: "\nstep 3 " in both.output(0)), both.output(0) + both.output(
            1
        )
        both.processes[1].send_signal(signal.SIGTERM)
        assert both.codes() == [SAVED, SAVED]
    finally:
        both.kill()
    assert "all saved" in both.output(0)
    assert "step" not in both.output(1).replace("stopping soon; once more stops at once", "")
    events = read_events(Path(config.folder) / "events.jsonl")
    (stopped,) = [line["step"] for line in events if line["event"] == "ended"]
    assert stopped >= 3
    lines = read_metrics(Path(config.folder) / "metrics.jsonl")
    for key in ("host_seconds", "wait_seconds", "chip_seconds"):
        assert [len(line[key]) for line in lines if "loss" in line] == [2] * stopped
    assert run_training(config) == DONE
    # The same sums in the same order, by other means of exchange.
    ours, theirs = losses(config), losses(straight)
    assert ours.keys() == theirs.keys()
    for step, loss in ours.items():
        assert loss == pytest.approx(theirs[step], rel=1e-4)


def test_what_one_host_refuses_ends_all_of_them(config: RunConfig, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    began = time.monotonic()
    both = Hosts([[str(file)], [str(file), "train.steps=many"]], tmp_path / "logs")
    try:
        assert both.codes() == [REFUSED, REFUSED]
    finally:
        both.kill()
    assert time.monotonic() - began < distributed.INITIALIZE_TIMEOUT_SECONDS
    assert "ended by process 1: override `train.steps=many`" in both.output(0)
    assert "Traceback" not in both.output(0) + both.output(1)


@pytest.mark.prove
def test_one_host_that_cannot_save_ends_both_at_once(config: RunConfig, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    many = ["checkpoint.every=5", "train.steps=1000"]
    both = Hosts([[str(file), *many]] * 2, tmp_path / "logs")
    try:
        assert both.wait_until(lambda: "\nstep 1 " in both.output(0)), both.output(0) + both.output(
            1
        )
        # From now on its files, its log among them, may not become larger; the other's may.
        resource.prlimit(both.processes[1].pid, resource.RLIMIT_FSIZE, (32768, 32768))
        # Far less than the 20 minutes for which the other would wait for its part.
        assert both.codes(timeout=300) == [RESTART, RESTART]
    finally:
        both.kill()
    assert "ended by process 1: the checkpoint of step " in both.output(0)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (("", "2", "0"), "with GROK_COORDINATOR as well, or with none of them, it would work"),
        (("localhost:80", "2", "2"), "GROK_NUM_PROCESSES=2 and GROK_PROCESS_ID=2 are no number"),
        (("localhost", "2", "1"), "GROK_COORDINATOR=localhost is no address"),
    ],
)
def test_an_environment_that_makes_no_sense(config, monkeypatch, values, sentence):
    for name, value in zip(cluster.CLUSTER_VARIABLES, values, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=sentence):
        distributed.initialize(config)


def test_the_names_that_jax_has_for_them_are_not_passed_over(config, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ConfigError, match=r"JAX_NUM_PROCESSES, which is not read here; GROK_"):
        distributed.initialize(config)


def test_alone_a_process_has_everything_to_itself(config):
    distributed.initialize(config)
    assert (
        distributed.process_index(),
        distributed.process_count(),
        distributed.broadcast_from_primary(lambda: 5),
    ) == (
        0,
        1,
        5,
    )
