"""A process that hangs ends by itself, before the first step and between steps."""

import subprocess
import sys

import pytest

from grok.errors import RESTART

SCRIPT = """
import sys, threading
from grok.config import TrainConfig
from grok.train.watchdog import Watchdog
config = TrainConfig(start_timeout_seconds=1, hang_timeout_seconds=1)
with Watchdog(config, sys.argv[1]) as watchdog:
    for step in sys.argv[2:]:
        watchdog.heartbeat(int(step))
    threading.Event().wait()
"""


def hang(folder, *steps):
    command = [sys.executable, "-c", SCRIPT, str(folder), *steps]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        ([], "the first step did not begin within 1 s (train.start_timeout_seconds);"),
        (["7"], "no step was finished for 1 s (train.hang_timeout_seconds) after step 7;"),
    ],
)
def test_a_hang_ends_the_process(tmp_path, steps, sentence):
    done = hang(tmp_path / "run", *steps)
    assert done.returncode == RESTART, done.stderr
    assert sentence in done.stderr
    assert "watchdog" in (tmp_path / "run" / "stacks-0.txt").read_text()


def test_a_hang_ends_the_process_also_where_its_folder_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    done = hang(tmp_path / "file" / "run")
    assert done.returncode == RESTART, done.stderr
    assert "the stacks of all threads are above" in done.stderr
