"""The host that holds up the others: found by what its chips and itself take, named if it lasts."""

from pathlib import Path

from grok.train.telemetry.host_times import (
    LINES,
    Slowest,
    Streak,
    WaitingThreads,
    find_slowest,
    slow_host,
)

EVEN = [0.02, 0.03, 0.02, 0.02]


def test_a_slow_chip_and_a_busy_host_are_found():
    assert find_slowest(EVEN, [1.0, 1.1, 1.0, 1.05], EVEN, 1.0) is None
    slowest = find_slowest(EVEN, [1.0, 1.0, 1.5, 1.1], EVEN, 1.0)
    assert slowest == Slowest(2, "its chips take 1.50 times as long for the same work")
    busy = [0.02, 0.9, 0.02, 0.02]
    slowest = find_slowest(busy, [1.0] * 4, EVEN, 1.0)
    assert slowest == Slowest(1, "data and dispatch take 90% of each step on the host")
    # It works beside its chips, which do not wait for it.
    assert find_slowest(busy, [1.0] * 4, EVEN, 10.0) is None
    assert find_slowest([0.1, 0.9], [1.0, 1.0], EVEN[:2], 1.0) == slowest
    assert find_slowest([0.0, 0.0], [0.0, 0.0], [0.0, 0.0], 1.0) is None
    # A container's share of processors is used up: little of a probe or of dispatch shows it.
    slowest = find_slowest(EVEN, [1.0] * 4, [0.0, 0.0, 0.0, 0.85], 1.0)
    assert slowest == Slowest(3, "its threads wait for a processor for 85% of each step")
    assert find_slowest(EVEN, [1.0] * 4, [0.0, 0.0, 0.0, 0.1], 1.0) is None
    assert find_slowest(EVEN, [1.0] * 4, [0.6, 0.7, 0.7, 0.8], 1.0) is None


def test_the_thread_that_waits_longest_for_a_processor(tmp_path: Path):
    def write(**waits: int):
        for task, wait in waits.items():
            (tmp_path / task).mkdir(exist_ok=True)
            (tmp_path / task / "schedstat").write_text(f"55 {wait} 7\n")

    write(a=5_000_000_000, b=0)
    threads = WaitingThreads(tmp_path)
    write(a=6_000_000_000, b=2_500_000_000, c=100)
    assert threads.seconds() == 2.5
    assert threads.seconds() == 0
    (tmp_path / "c" / "schedstat").write_text("")
    assert threads.seconds() == 0
    assert WaitingThreads(tmp_path / "on another system").seconds() == 0


def test_only_who_is_slow_for_long_is_named():
    streak, slow = Streak(), Slowest(3, "it is slow")
    assert [streak.add(slow) for _ in range(LINES + 1)] == [None] * (LINES - 1) + [slow, slow]
    assert streak.add(None) is None
    assert streak.add(slow) is None
    streak = Streak()
    for process in range(2 * LINES):
        assert streak.add(Slowest(process % 2, "by chance")) is None
    assert [streak.add(None) for _ in range(LINES + 1)] == [None] * (LINES + 1)


def test_the_sentence_of_a_line():
    line = {"slow_host": "host-7", "slow_host_reason": "process 7: it is slow"}
    assert slow_host(line) == "the slowest host is host-7, process 7: it is slow"
    assert slow_host({"loss": 1.0}) is None
