"""The babysitter with real `grok train` processes as the workers, taken away three times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from grok.config import RunConfig
from grok.config_files import save_config
from tests.launch.cloud import ROOT, Cloud


@pytest.mark.prove
def test_three_preemptions_of_a_real_run(cloud: Cloud, tiny_run: RunConfig) -> None:
    config = cloud.folder / "tiny.yaml"
    save_config(tiny_run, config)
    words = [f"folder={cloud.run_folder}", "train.steps=60", "checkpoint.every=5"]
    cloud._program(
        "worker-bin/venv/grok",
        f'exec {sys.executable} -c "from grok.cli.main import main; main()" "$@"',
    )
    cloud.script(
        preempt_at=[6, 21, 42],
        worker_environment={
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XDG_CACHE_HOME": str(cloud.folder / "cache"),
        },
    )
    done = cloud.launch("babysit", "--", "grok", "train", str(config), *words, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the slice is SUSPENDED") == 3, done.stderr
    assert "done, at step 60" in done.stderr

    undisturbed = cloud.folder / "undisturbed"
    command = ["train", str(config), f"folder={undisturbed}", *words[1:]]
    subprocess.run([Path(sys.executable).parent / "grok", *command], check=True, timeout=300)
    assert losses(cloud.run_folder) == losses(undisturbed)


def losses(run: Path) -> dict[int, float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}
