"""Servers of four processes: the tokens of one process, and the end of all when one is lost."""

import os
import signal

import pytest

from grok.errors import RESTART, SAVED
from tests.serve.hosts import Server, write_model

pytestmark = pytest.mark.prove

REQUESTS = (
    {"prompt": ["The 1", "5 comes after"], "temperature": 1, "seed": 3, "n": 2, "logprobs": 2},
    {"prompt": "7 comes", "temperature": 0, "logprobs": 0, "stop": ["9", "is"]},
    {"prompt": "7 comes", "temperature": 0.7, "seed": 1, "echo": True, "logprobs": 0},
    {"prompt": "12 comes after 11", "seed": 2, "frequency_penalty": 1.5, "best_of": 3},
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def choices(server: Server) -> list:
    return [server.complete(model="tiny", max_tokens=20, **body)["choices"] for body in REQUESTS]


def logprobs(choice: dict) -> list[float]:
    return [value for value in choice["logprobs"]["token_logprobs"] if value is not None]


def test_four_processes_answer_as_one_does(weights, tmp_path):
    answers = {}
    for count in (1, 4):
        server = Server(weights, count, tmp_path / str(count))
        try:
            server.wait_until_answers()
            answers[count] = choices(server)
            server.hosts.processes[-1].send_signal(signal.SIGTERM)
            assert server.hosts.codes(60) == [SAVED] * count
        finally:
            server.hosts.kill()
    for one, four in zip(answers[1], answers[4], strict=True):
        assert [choice["text"] for choice in four] == [choice["text"] for choice in one]
        for ours, theirs in zip(four, one, strict=True):
            if theirs["logprobs"]:
                assert ours["logprobs"]["tokens"] == theirs["logprobs"]["tokens"]
                assert logprobs(ours) == pytest.approx(logprobs(theirs), abs=1e-5)


@pytest.mark.parametrize(
    ("victim", "number"), [(2, signal.SIGKILL), (3, signal.SIGSTOP), (0, signal.SIGSTOP)]
)
def test_a_lost_process_ends_all_to_be_started_again(weights, tmp_path, victim, number):
    server = Server(weights, 4, tmp_path, "heartbeat_timeout_seconds=10")
    try:
        server.wait_until_answers()
        processes = list(server.hosts.processes)
        os.kill(processes[victim].pid, number)
        survivors = [process for index, process in enumerate(processes) if index != victim]
        assert [process.wait(60) for process in survivors] == [RESTART] * 3
    finally:
        server.hosts.kill()
