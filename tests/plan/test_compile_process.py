"""The process that compiles does not outlive the one that asked, however that one ends."""

import dataclasses
import json
import os
import select
import signal
import subprocess
import sys

import pytest

from grok.config.load import load_config, to_dict
from grok.plan.compile import ENVIRONMENT
from grok.plan.rates import published_rates
from tests.fixtures.prove import in_suite

# A parent that asks, says the number of the process that compiles, and waits.
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-m", "grok.plan.compile_process"],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
child.stdin.write(sys.argv[1] + "\\n")
child.stdin.flush()
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.parametrize("number", in_suite([signal.SIGTERM, signal.SIGKILL], signal.SIGKILL))
def test_no_compiler_is_left_behind(number):
    request = {"config": to_dict(load_config("grok-1b")), "topology": "v5e:2x4", "slices": 1}
    request["rates"] = dataclasses.asdict(published_rates("v5e"))
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, json.dumps(request)],
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    with parent.stdout as lines:
        compiler = os.pidfd_open(int(lines.readline()))
    parent.send_signal(number)
    assert parent.wait() == -number
    ended, _, _ = select.select([compiler], [], [], 60)  # readable when the process has ended
    os.close(compiler)
    assert ended
