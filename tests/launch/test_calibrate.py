"""The run that measures a slice: whatever it finds, its slice is gone afterwards."""

import shlex
import subprocess

import pytest

from grok.cli.calibrate import calibrate
from tests.launch.cloud import ROOT, Cloud
from tests.launch.test_dry_run import dry_run
from tests.launch.test_real_training import GROK


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


def test_a_second_start_leaves_the_slice_of_the_live_one(cloud: Cloud) -> None:
    with started(cloud, "touch $STUB/live; until_asked") as process:
        cloud.wait_for(cloud.stub / "live")
        again = cloud.launch("runs/calibrate")
        assert again.returncode == 2
        assert "already babysits grok-calibrate" in again.stderr
        assert cloud.slice is not None
        cloud.launch("runs/calibrate", "stop")
        assert process.wait(60) == 75
    assert cloud.slice is None


@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_a_misspelt_key_leaves_the_slice_of_an_up(cloud: Cloud, words: list[str]) -> None:
    cloud.settings(LAUNCH_BUCKET="gs://b")
    cloud.program("bin/grok", GROK)
    assert cloud.launch("runs/calibrate", "up").returncode == 0
    calls = len(cloud.calls())
    key = [*words, "--", "mesh.slicee=1"]
    done = cloud.launch("runs/calibrate", *key, PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no key mesh.slicee" in done.stderr
    assert (len(cloud.calls()), cloud.slice is None) == (calls, False)


def test_a_stopped_wait_for_a_slice_withdraws_the_request(cloud: Cloud) -> None:
    cloud.settings(LAUNCH_BUCKET="gs://b")
    cloud.script(lives=[["WAITING_FOR_RESOURCES"]])
    cloud.environment["LAUNCH_NAME"] = "grok-calibrate"
    cloud.after("queued-resources create", "stop")
    done = cloud.launch("runs/calibrate")
    assert (done.returncode, cloud.starts()) == (75, 0), done.stderr
    assert cloud.slice is None


def started(cloud: Cloud, plan: str) -> subprocess.Popen[str]:
    """A calibration under way."""
    cloud.settings(LAUNCH_BUCKET="gs://b")
    cloud.plan(last=plan)
    return subprocess.Popen(
        [cloud.checkout / "launch" / "runs" / "calibrate.sh"],
        env=cloud.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )
