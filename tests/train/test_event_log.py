"""The log of a run's time, and the goodput that comes of it."""

import json

import pytest

from grok.train.telemetry.event_log import EventLog, measure_goodput, read_events


def lines_of(*lines: tuple) -> list[dict]:
    """Events from (time, event, facts)."""
    return [{"time": time, "event": event, **facts} for time, event, facts in lines]


def test_a_span_leaves_out_what_ran_inside_it(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with EventLog(tmp_path / "events.jsonl") as events:
        with events.during("start"):
            now[0] += 5
            with events.during("restore", step=3):
                now[0] += 20
        events.steps_from(3)
        now[0] += 7
        with events.waiting():
            now[0] += 1
        with events.during("save"):
            now[0] += 2
        events.steps_to(10)
    seconds = {
        line["event"]: line.get("seconds") for line in read_events(tmp_path / "events.jsonl")
    }
    assert seconds == {"began": None, "restore": 20, "start": 5, "save": 2, "steps": 7, "data": 1}


def test_steps_need_no_line_each(tmp_path):
    with EventLog(tmp_path / "events.jsonl") as events:
        for step in range(1, 50):
            events.steps_to(step, at_once=False)
        events.steps_to(50)
        events.steps_to(50)
    (steps,) = [e for e in read_events(tmp_path / "events.jsonl") if e["event"] == "steps"]
    assert (steps["first"], steps["last"]) == (0, 50)


def test_a_span_that_fails_has_no_line_and_a_cut_line_costs_no_other(tmp_path):
    path = tmp_path / "events.jsonl"
    with pytest.raises(OSError, match="full"), EventLog(path) as events, events.during("save"):
        raise OSError("disk full")
    path.write_bytes(path.read_bytes() + b'{"time": 3.0, "ev')
    with EventLog(path) as events:
        events.note("resumed", step=10)
    assert [line["event"] for line in read_events(path)] == ["began", "began", "resumed"]
    assert json.loads(path.read_text().splitlines()[-1])["step"] == 10


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with EventLog(None) as events:
        with events.during("save"):
            events.note("asked to stop")
        events.steps_to(5)
    assert list(tmp_path.iterdir()) == []


def test_goodput_counts_steps_done_again_once_and_gaps_as_down():
    events = lines_of(
        (0, "began", {}),
        (0, "start", {"seconds": 5}),
        (5, "resumed", {"step": 0}),
        (5, "compile", {"seconds": 15}),
        (20, "steps", {"first": 1, "last": 101, "seconds": 98}),
        (20, "data", {"seconds": 2}),
        (120, "save", {"seconds": 4}),
        (124, "steps", {"first": 101, "last": 201, "seconds": 100}),
        # Killed at step 201; the checkpoint is of step 151.
        (264, "began", {}),
        (264, "restore", {"seconds": 6}),
        (270, "resumed", {"step": 151}),
        (270, "steps", {"first": 151, "last": 201, "seconds": 50}),
        (320, "ended", {"step": 201, "code": 0}),
    )
    measured = measure_goodput(events)
    assert measured.seconds == {
        "useful": 198.0,
        "lost": 50.0,
        "start": 5.0,
        "restore": 6.0,
        "compile": 15.0,
        "data": 2.0,
        "validate": 0.0,
        "save": 4.0,
        "profile": 0.0,
        "sdc_check": 0.0,
        "down": 40.0,
        "other": 0.0,
    }
    assert measured.total == 320
    assert measured.share == pytest.approx(198 / 320)


def test_after_a_finished_run_no_time_is_lost_until_it_is_made_longer():
    events = lines_of(
        (0, "began", {}),
        (0, "steps", {"first": 0, "last": 10, "seconds": 10}),
        (10, "ended", {"step": 10, "code": 0}),
        (90000, "began", {}),
        (90000, "resumed", {"step": 10}),
        (90000, "steps", {"first": 10, "last": 20, "seconds": 10}),
    )
    assert measure_goodput(events).share == 1
    assert measure_goodput([]).share == 0


def test_steps_before_a_return_to_a_checkpoint_are_lost():
    events = lines_of(
        (0, "began", {}),
        (0, "resumed", {"step": 0}),
        (0, "steps", {"first": 0, "last": 20, "seconds": 20}),
        (20, "rolled_back", {"step": 10}),
        (20, "steps", {"first": 10, "last": 30, "seconds": 20}),
    )
    measured = measure_goodput(events).seconds
    assert (measured["useful"], measured["lost"]) == (30, 10)
