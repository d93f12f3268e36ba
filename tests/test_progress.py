"""The progress display: lines where there is no terminal, the pace since the first update."""

from types import SimpleNamespace

import pytest

from grok.progress import ProgressDisplay, byte_progress, duration


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("grok.progress.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_lines_come_now_and_then_with_the_pace_of_this_process(clock, capsys):
    with ProgressDisplay("requests {done:,}/{total:,}", total=100, done=40) as display:
        for seconds, done in ((50, 40), (55, 45), (70, 60), (75, 65)):
            clock.now = seconds
            display.update(done, f"{display.rate('requests', done):.1f} a second")
    assert capsys.readouterr().out == "requests 45/100  1.0 a second  55 s left\n" + (
        "requests 60/100  1.0 a second  40 s left\n"
    )


def test_a_quiet_display_shows_nothing(clock, capsys):
    with ProgressDisplay("{done}", total=2, quiet=True) as display:
        for done in range(3):
            clock.now += 100
            display.update(done)
        display.log("done")
    assert capsys.readouterr() == ("", "")


def test_bytes_of_an_earlier_try_are_no_part_of_the_rate(clock, capsys):
    with byte_progress() as on_progress:
        on_progress("a", 10**9, 3 * 10**9)
        clock.now += 20
        on_progress("b", 2 * 10**9, 3 * 10**9)
    assert capsys.readouterr() == (
        "",
        "1,000,000,000 of 3,000,000,000 bytes are there from an earlier try\n"
        " 67% of 3,000,000,000 bytes  50 MB/s  b  20 s left\n",
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(7, "7 s"), (98, "98 s"), (125, "2 min"), (12000, "3 h 20 min"), (443000, "5 d 3 h")],
)
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text
