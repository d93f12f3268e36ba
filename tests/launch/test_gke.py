"""The JobSet manifests are the worked runs."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.launch.cloud import LAUNCH, ROOT

GOLDEN = Path(__file__).parent / "golden"


def manifest(run: str) -> dict[str, Any]:
    return YAML(typ="safe").load((LAUNCH / "gke" / f"{run}.yaml").read_text())


@pytest.mark.parametrize(
    ("run", "topology", "nodes", "chips"),
    [
        ("continue-v5p", "4x4x8", 32, 4),
        ("pretrain-v5e", "2x4", 1, 8),
        ("batch-v6e", "4x4", 4, 4),
        ("serve-v6e", "4x4", 4, 4),
        ("serve-v6e-int4", "2x4", 1, 8),
    ],
)
def test_a_manifest_runs_the_command_of_the_worked_run(
    run: str, topology: str, nodes: int, chips: int
) -> None:
    jobset = manifest(run)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    [job] = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (spec["parallelism"], spec["completions"], job["replicas"]) == (nodes, nodes, 1)
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology
    assert ("cloud.google.com/gke-spot" in pod["nodeSelector"]) == (run == "pretrain-v5e")
    [container] = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    golden = (GOLDEN / f"{run}.txt").read_text().splitlines()
    [line] = [line for line in golden if line.startswith("# command.sh: exec ")]
    assert container["command"] == shlex.split(line.removeprefix("# command.sh: exec "))
    [create] = [line for line in golden if "queued-resources create" in line]
    assert f"--node-id={jobset['metadata']['name']} " in create


@pytest.mark.parametrize(
    "run", ["continue-v5p", "pretrain-v5e", "batch-v6e", "serve-v6e", "serve-v6e-int4"]
)
def test_a_manifest_keeps_the_contract_of_exit_codes(run: str) -> None:
    spec = manifest(run)["spec"]
    [rule] = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    job = spec["replicatedJobs"][0]["template"]["spec"]
    [fail] = job["podFailurePolicy"]["rules"]
    assert (fail["action"], fail["onExitCodes"]["values"]) == ("FailJob", [2, 65])
    assert fail["onExitCodes"]["containerName"] == "grok"
    assert (job["backoffLimit"], job["template"]["spec"]["restartPolicy"]) == (0, "Never")


def test_uv_is_pinned_by_hash_wherever_it_is_installed() -> None:
    places = (ROOT / "Makefile", LAUNCH / "worker.sh", ROOT / "Dockerfile")
    for text in (path.read_text().replace("\\\n", " ") for path in places):
        (line,) = (line for line in text.splitlines() if re.search(r"\bpip install\b.*uv", line))
        assert "--require-hashes" in line and "requirements-uv.lock" in line
    lock = (ROOT / "requirements-uv.lock").read_text()
    assert re.search(
        r"^uv==[\d.]+ \\\n( +--hash=sha256:[0-9a-f]{64}( \\)?\n)+$", lock, re.MULTILINE
    )
