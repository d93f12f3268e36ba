"""What the worked runs would do, word for word; to accept a change: UPDATE_GOLDEN=1 pytest ..."""

import os
import re
import shlex
from pathlib import Path

import pytest

from tests.launch.cloud import LAUNCH, Cloud, git

GOLDEN = Path(__file__).parent / "golden"
RUNS = ("continue-v5p", "pretrain-v5e", "batch-v6e", "serve-v6e", "serve-v6e-int4", "calibrate")
VERBS = ("up", "setup", "sync", "status", "logs", "tunnel", "stop", "down", "cost", "doctor")


def dry_run(cloud: Cloud, verb: str, *words: str) -> str:
    example = str(cloud.checkout / "launch" / "settings.env.example")
    done = cloud.launch(verb, "--dry-run", "--settings", example, *words, LAUNCH_STATE="STATE")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    commit = git(cloud.checkout, "rev-parse", "HEAD")
    text = done.stdout.replace(str(cloud.checkout), "CHECKOUT")
    return text.replace(commit, "COMMIT").replace(commit[:12], "STAMP")


@pytest.mark.parametrize("run", RUNS)
def test_dry_run_of_a_worked_run(cloud: Cloud, run: str) -> None:
    text = dry_run(cloud, f"runs/{run}")
    golden = GOLDEN / f"{run}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()
    assert cloud.calls() == []
    assert not (cloud.checkout / "STATE").exists()


@pytest.mark.parametrize("run", RUNS)
def test_any_verb_with_the_settings_of_a_worked_run(cloud: Cloud, run: str) -> None:
    name = re.search(r"LAUNCH_NAME=(\S+)", (LAUNCH / "runs" / f"{run}.sh").read_text())
    assert name
    text = dry_run(cloud, f"runs/{run}", "logs", "--follow")
    assert f"queued-resources ssh {name[1]} " in text
    assert "worker.sh logs 20 follow" in text


def test_keys_are_added_to_the_command_of_a_worked_run(cloud: Cloud) -> None:
    text = dry_run(cloud, "runs/pretrain-v5e", "run", "--", "train.steps=2000")
    assert "checkpoint.keep=2 train.steps=2000\n" in text
    text = dry_run(cloud, "runs/pretrain-v5e", "run", "--", "--resume", "optimizer.peak_lr=1e-4")
    assert "checkpoint.keep=2 --resume optimizer.peak_lr=1e-4\n" in text


@pytest.mark.parametrize("verb", VERBS)
def test_dry_run_calls_nothing_and_prints_what_a_shell_reads_back(cloud: Cloud, verb: str) -> None:
    text = dry_run(cloud, verb)
    assert cloud.calls() == []
    if verb != "cost":
        assert all(shlex.split(line)[0] in ("gcloud", "git") for line in text.splitlines())


@pytest.mark.parametrize(
    "verb",
    [
        str(path.relative_to(LAUNCH).with_suffix(""))
        for path in sorted(LAUNCH.rglob("*.sh"))
        if os.access(path, os.X_OK)
    ],
)
def test_help_says_how_it_is_used(cloud: Cloud, verb: str) -> None:
    done = cloud.launch(verb, "--help", LAUNCH_SETTINGS="/nowhere")
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: launch/{verb}.sh")
    assert "--dry-run" in done.stdout


def test_the_command_of_the_batch_run_is_a_config_that_holds(cloud: Cloud) -> None:
    from grok.config.infer import BatchConfig
    from grok.config.load import load_config

    text = dry_run(cloud, "runs/batch-v6e")
    line = next(line for line in text.splitlines() if line.startswith("# command.sh: exec "))
    words = shlex.split(line.removeprefix("# command.sh: exec "))
    assert words[:2] == ["grok", "batch"]
    config = load_config(words[2], words[3:], BatchConfig)
    assert config.mesh.data * config.mesh.expert * config.mesh.tensor == 16
    assert (config.replica, config.output) == ("all", "gs://my-bucket/answers")


def test_the_command_of_the_server_is_a_config_that_holds(cloud: Cloud) -> None:
    from grok.config.serve import load_serve_config

    text = dry_run(cloud, "runs/serve-v6e")
    line = next(line for line in text.splitlines() if line.startswith("# command.sh: exec "))
    words = shlex.split(line.removeprefix("# command.sh: exec "))
    assert words[:2] == ["grok", "serve"]
    config = load_serve_config(words[2], words[3:])
    assert config.mesh.data * config.mesh.expert * config.mesh.tensor == 16
    assert (config.local, config.weights) == (True, "gs://my-bucket/grok-1/ckpt-0")


def test_a_tunnel_forwards_a_port_to_the_first_worker(cloud: Cloud) -> None:
    words = dry_run(cloud, "runs/serve-v6e", "tunnel", "9000").split()
    assert words[:6] == "gcloud compute tpus queued-resources ssh grok-serve".split()
    assert words[6:8] == ["--node=0", "--worker=0"]
    assert words[words.index("--") :][1:4] == ["-N", "-L", "127.0.0.1:9000:127.0.0.1:8000"]
    done = cloud.launch("tunnel", "--dry-run", "http")
    assert (done.returncode, "'http' is no port" in done.stderr) == (2, True)


@pytest.mark.parametrize("run", ["continue-v5p", "pretrain-v5e"])
def test_the_commands_of_worked_runs_are_configs_that_hold(cloud: Cloud, run: str) -> None:
    from grok.config.load import load_config

    text = dry_run(cloud, f"runs/{run}")
    line = next(line for line in text.splitlines() if line.startswith("# command.sh: exec "))
    words = shlex.split(line.removeprefix("# command.sh: exec "))
    assert words[:2] == ["grok", "train"]
    config = load_config(words[2], words[3:])
    chips = {"continue-v5p": 128, "pretrain-v5e": 8}[run]
    assert config.mesh.data * config.mesh.expert * config.mesh.tensor == chips
    assert config.folder.startswith("gs://my-bucket/runs/")
