"""The run that measures a slice: whatever it finds, its slice is gone afterwards."""

import shlex

import pytest

from grok.cli.calibrate import calibrate
from tests.launch.cloud import Cloud
from tests.launch.test_dry_run import dry_run


def test_the_command_is_one_that_holds(cloud: Cloud) -> None:
    text = dry_run(cloud, "runs/calibrate")
    line = next(line for line in text.splitlines() if line.startswith("# command.sh: exec "))
    words = shlex.split(line.removeprefix("# command.sh: exec "))
    assert words[:5] == ["timeout", "--kill-after=60", "1200", "grok", "calibrate"]
    context = calibrate.make_context("calibrate", words[5:])
    assert context.params["out"] == "gs://my-bucket/calibrations/v5litepod-8.json"


@pytest.mark.parametrize("code", [0, 65])
def test_the_verdict_is_printed_and_the_slice_deleted(cloud: Cloud, code: int) -> None:
    cloud.settings(LAUNCH_BUCKET="gs://b")
    cloud.plan(last=f"echo '2 of 2 kernels are right'; exit {code}")
    done = cloud.launch("runs/calibrate")
    assert done.returncode == code, done.stderr
    assert "2 of 2 kernels are right" in done.stdout
    assert cloud.starts() == 1
    assert cloud.slice is None


def test_a_start_that_fails_twice_is_given_up(cloud: Cloud) -> None:
    cloud.settings(LAUNCH_BUCKET="gs://b")
    cloud.plan(last="exit 134")
    done = cloud.launch("runs/calibrate")
    assert (done.returncode, cloud.starts()) == (1, 2), done.stderr
    assert cloud.slice is None


def test_what_is_refused_before_a_slice_is_requested_deletes_none(cloud: Cloud) -> None:
    done = cloud.launch("runs/calibrate")
    assert done.returncode == 2
    assert "LAUNCH_BUCKET is not set" in done.stderr
    assert cloud.calls() == []
