"""The babysitter with real `grok train` processes on two workers, taken away three times."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from grok.config import RunConfig
from grok.config.load import to_dict
from tests.fixtures.network import free_address
from tests.launch.cloud import ROOT, Cloud

GROK = f'exec {sys.executable} -c "from grok.cli.main import main; main()" "$@"'


@pytest.mark.prove
def test_three_preemptions_of_a_real_run(cloud: Cloud, tiny_run: RunConfig) -> None:
    config = cloud.folder / "tiny.yaml"
    config.write_text(json.dumps(to_dict(tiny_run)))
    mesh = ["mesh.data=2", "mesh.expert=1", "mesh.tensor=1", "mesh.simulated_devices=2"]
    words = [*mesh, "train.steps=400", "checkpoint.every=20", f"folder={cloud.run_folder}"]
    environment = {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        # What these tests compile, and how, as in their own process.
        **{name: os.environ[name] for name in ("XDG_CACHE_HOME", "XLA_FLAGS")},
        "GROK_COORDINATOR": free_address(),
        "GROK_NUM_PROCESSES": "2",
    }
    cloud.several_hosts(2)
    cloud.program("worker-bin/venv/grok", GROK)
    cloud.script(
        # By what is saved, so that each start but the first resumes, and far enough apart that a
        # run that is fast is not at the next of them when it is looked at.
        checkpoints=str(cloud.run_folder / "checkpoints"),
        preempt_at=[20, 120, 220],
        worker_environment=environment,
    )
    command = ["--", "grok", "train", str(config), *words]
    # A look costs processor time that the run needs.
    done = cloud.launch("babysit", *command, timeout=1800, LAUNCH_POLL_SECONDS="0.5")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the slice is SUSPENDED") == 3, done.stderr
    assert "exit code 0 of 2 workers" in done.stderr
    assert "done, at step 400" in done.stderr

    steps = [line["step"] for line in metrics(cloud.run_folder) if "loss" in line]
    assert steps == list(range(1, 401))
    assert sum(line.get("event") == "resumed" for line in metrics(cloud.run_folder)) >= 3


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
