"""A server that hangs is ended, in its start and in a step."""

import queue

import pytest

from grok import distributed
from grok.config.infer import ServeConfig
from grok.errors import RESTART
from grok.serve.watchdog import Watchdog

PATIENCE_SECONDS = 20
CONFIG = ServeConfig(weights="w", start_timeout_seconds=1, hang_timeout_seconds=1)


@pytest.mark.parametrize(
    ("step_began", "sentence"),
    [
        (None, "the engine was not ready within 1 s (start_timeout_seconds); the stacks of"),
        (1e-9, "a step took more than 1 s (hang_timeout_seconds); the stacks of all threads"),
    ],
)
def test_a_hang_ends_the_server(monkeypatch, capfd, step_began, sentence):
    aborted = queue.Queue()
    monkeypatch.setattr(distributed, "abort", lambda *arguments: aborted.put(arguments))
    with Watchdog(CONFIG) as watchdog:
        if step_began is not None:
            watchdog.ready(lambda: step_began)
        code, reason = aborted.get(timeout=PATIENCE_SECONDS)
    assert code == RESTART
    assert reason.startswith(sentence)
    assert "test_watchdog.py" in capfd.readouterr().err  # of the stacks


def test_between_steps_and_without_limits_nothing_ends(monkeypatch):
    monkeypatch.setattr(distributed, "abort", lambda *arguments: pytest.fail("aborted"))
    unlimited = ServeConfig(weights="w", start_timeout_seconds=0, hang_timeout_seconds=0)
    for config, step_began in ((CONFIG, None), (unlimited, 1e-9)):
        watchdog = Watchdog(config)
        watchdog.ready(lambda began=step_began: began)
        assert watchdog.problem() is None
