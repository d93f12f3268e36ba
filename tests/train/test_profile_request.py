"""A profile of a job that trains, asked for from outside."""

import json
import threading
from pathlib import Path

import jax
import pytest
from click.testing import CliRunner

from grok.cli.main import main
from grok.errors import GrokError
from grok.locks.folder import hold_folder
from grok.train.telemetry import profile_request, profiler
from grok.train.telemetry.event_log import EventLog
from grok.train.telemetry.profile_request import Answer, request_profile
from grok.train.telemetry.run_manifest import RunDir


@pytest.fixture
def traces(monkeypatch) -> list[str]:
    """What the profiler of JAX is told."""
    calls: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    for module, name in ((profile_request, "SECONDS"), (profiler, "POLL_SECONDS")):
        monkeypatch.setattr(module, name, 0.001)
    return calls


def test_the_next_steps_of_a_job_are_profiled_and_told(tmp_path, traces):
    run, answers = str(tmp_path), list[Answer]()
    with (
        hold_folder(run),
        EventLog(None, 0.0) as events,
        profiler.Profiler(RunDir(run), run, (2, 3), events) as job,
    ):
        asking = threading.Thread(target=lambda: answers.append(request_profile(run, 3)))
        asking.start()
        step = 0
        while asking.is_alive():
            step += 1
            job.before(step)
            job.after(step, {})
    [answer] = answers
    assert answer.last - answer.first == 2
    assert traces == [f"{run}/profile", "stop"] * 2  # of train.profile, and of the request
    assert sorted(path.name for path in tmp_path.iterdir()) == []


def test_a_request_that_is_none_is_dropped(tmp_path):
    file = tmp_path / profile_request.REQUEST_FILE
    for data in (b"{", b"[]", b'{"steps": 0, "token": "a"}', b'{"steps": 1}', b'{"steps": "3"}'):
        file.write_bytes(data)
        assert profile_request.take_request(tmp_path) is None
    file.write_bytes(json.dumps({"steps": 4, "token": "a"}).encode())
    assert profile_request.take_request(tmp_path) == profile_request.Request(4, "a")
    assert not file.exists()


def test_a_job_that_ends_first_is_told(tmp_path, monkeypatch):
    held = iter([object(), object(), None])
    monkeypatch.setattr(profile_request, "find_owner", lambda _: next(held))
    monkeypatch.setattr(profile_request, "SECONDS", 0)
    with pytest.raises(GrokError, match="the job ended before its profile was written"):
        request_profile(str(tmp_path), 1)
    assert not list(Path(tmp_path).iterdir())


def test_where_nothing_trains_nothing_is_asked(tmp_path):
    result = CliRunner().invoke(main, ["profile", str(tmp_path)])
    assert result.exit_code == 1
    assert "nothing is training here now; `grok train` there" in result.output
    assert not list(tmp_path.iterdir())
