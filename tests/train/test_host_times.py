"""The host that holds up the others: found by what its chips and itself take, named if it lasts."""

from grok.train.telemetry.host_times import LINES, Slowest, Streak, find_slowest, slow_host

EVEN = [0.02, 0.03, 0.02, 0.02]


def test_a_slow_chip_and_a_busy_host_are_found():
    assert find_slowest(EVEN, [1.0, 1.1, 1.0, 1.05], 1.0) is None
    slowest = find_slowest(EVEN, [1.0, 1.0, 1.5, 1.1], 1.0)
    assert slowest == Slowest(2, "its chips take 1.50 times as long for the same work")
    busy = [0.02, 0.9, 0.02, 0.02]
    slowest = find_slowest(busy, [1.0] * 4, 1.0)
    assert slowest == Slowest(1, "data and dispatch take 90% of each step on the host")
    # It works beside its chips, which do not wait for it.
    assert find_slowest(busy, [1.0] * 4, 10.0) is None
    assert find_slowest([0.1, 0.9], [1.0, 1.0], 1.0) == slowest
    assert find_slowest([0.0, 0.0], [0.0, 0.0], 1.0) is None


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
