"""`grok calibrate` by two processes that share a mesh: process 0 says what both found."""

import json
import os
import subprocess
import sys

import pytest

from grok.cluster import CLUSTER_VARIABLES
from grok.errors import DIVERGED
from tests.fixtures.network import free_address

pytestmark = pytest.mark.prove

# Small arrays and short loops; one kernel, which is wrong in the process with a last argument.
SCRIPT = """
import sys
from grok.calibrate import collectives, kernels, rates, timing

rates.CPU_MATRIX, rates.CPU_ARRAY, collectives.CPU_BYTES = 128, 2**20, 2**18
timing.MIN_SECONDS, timing.REPEATS = 0, 2
check = kernels.CHECKS[0]
if sys.argv[-1] == "broken":
    sys.argv.pop()
    kernel = check.kernel
    check = check._replace(kernel=lambda *a, **k: {"y": 1.01 * kernel(*a, **k)["y"]})
kernels.CHECKS = [check]

from grok.cli.main import main

main()
"""


def test_two_processes_agree(tmp_path):
    address = free_address()
    out = tmp_path / "measured.json"
    mesh = ["mesh.simulated_devices=4", "mesh.data=2", "mesh.expert=2"]
    command = ["calibrate", *mesh, "--only", "kernels", "--only", "rates", "--out", str(out)]
    processes = []
    for number, last in enumerate(([], ["broken"])):
        cluster = dict(zip(CLUSTER_VARIABLES, (address, "2", str(number)), strict=True))
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT, *command, *last],
                env=os.environ | cluster,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    first, second = (process.communicate(timeout=600)[0] for process in processes)
    assert [process.returncode for process in processes] == [DIVERGED, DIVERGED], first + second
    assert "WRONG: grouped_matmul: wrong in process 1" in first
    assert "kernels are right" not in second  # process 0 speaks for both
    measured = json.loads(out.read_text())
    assert measured["device"]["processes"] == 2
    assert set(measured["collectives"]) == {"data", "expert"}
    assert measured["collectives"]["data"]["bytes_per_second"]["all-gather"]["median"] > 0
