"""The channel between the processes of a server, and engines that repeat each other's calls."""

import contextlib
import json
import queue
import socket
import threading

import pytest

from grok.config.sampling import SamplingParams
from grok.data.tokenizers import load_tokenizer
from grok.errors import Lost, RequestError
from grok.infer.request import Request
from grok.serve.channel import (
    HEARTBEAT,
    Closed,
    FollowerChannel,
    Peer,
    PrimaryChannel,
    encode,
    receive,
)
from grok.serve.replicated import ReplicatedEngine, repeat_calls, to_request
from tests.infer.fake_engine import FakeEngine

PATIENCE_SECONDS = 20
LONG_SECONDS = 300.0  # of heartbeats that no test waits for


class LostReasons(queue.Queue):
    """The sentences about processes that were lost."""

    def __call__(self, index: int, reason: str) -> None:
        assert reason.startswith(f"process {index} ")
        self.put(reason)


@pytest.fixture
def lost():
    return LostReasons()


@pytest.fixture
def connected(lost):
    """Process 0 and two followers, and the reasons why either lost the other."""
    with contextlib.ExitStack() as stack:
        primary = PrimaryChannel(2, LONG_SECONDS, lost)
        stack.callback(primary.close)
        address = "127.0.0.1", primary.port
        followers = [
            FollowerChannel(address, index, primary.token, LONG_SECONDS, lost) for index in (2, 1)
        ]
        for follower in followers:
            stack.callback(follower.close)
        primary.accept(PATIENCE_SECONDS)
        yield primary, followers


def test_frames_arrive_as_they_were_sent_in_their_order(connected, lost):
    primary, followers = connected
    frames = [{"text": "ä\n" * 100_000}, {"calls": []}, {"numbers": list(range(5000))}]
    for frame in frames:
        primary.send(frame)
    primary.end()
    for follower in followers:
        assert [follower.receive() for _ in range(4)] == [*frames, None]
        follower.close()
    assert lost.empty()


def test_what_is_no_frame_closes_the_connection():
    for data in (b"\0\0\0\5hello", b"\0\0\1\0{}", b"\xff\xff\xff\xff", b"\0"):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)
            with pytest.raises(Closed):
                receive(ours, 100)


@pytest.mark.parametrize(
    "hello",
    [
        encode({"process": 1, "token": "guess"}),
        encode({"process": 1}),
        encode(["no", "object"]),
        b"GET / HTTP/1.1\r\n\r\n",
        encode({"process": 1, "token": "x" * 5000}),
        encode({"process": 1, "token": "\ud800"}),
        b"\0\0\x0f\xa0" + b"[" * 4000,
    ],
)
def test_a_connection_without_the_token_is_closed_and_the_right_one_served(lost, hello):
    primary = PrimaryChannel(1, LONG_SECONDS, lost)
    address = "127.0.0.1", primary.port
    with socket.create_connection(address) as stranger:
        stranger.sendall(hello)
        follower = FollowerChannel(address, 1, primary.token, LONG_SECONDS, lost)
        primary.accept(PATIENCE_SECONDS)
        with contextlib.suppress(ConnectionError):
            assert stranger.recv(1) == b""
        primary.send({"step": 1})
        assert follower.receive() == {"step": 1}
    primary.end()
    assert follower.receive() is None
    follower.close()
    primary.close()


def test_a_process_is_not_taken_for_another_one(lost):
    primary = PrimaryChannel(2, LONG_SECONDS, lost)
    address = "127.0.0.1", primary.port
    followers = [
        FollowerChannel(address, index, primary.token, LONG_SECONDS, lambda index, reason: None)
        for index in (1, 1, 3)
    ]
    with pytest.raises(Lost, match=r"process 2 did not connect to process 0 within 0.2 s"):
        primary.accept(0.2)
    for end in (primary, *followers):
        end.close()


def test_a_follower_that_is_gone_is_named(connected, lost):
    _, (follower, _) = connected
    follower.close()
    assert lost.get(timeout=PATIENCE_SECONDS).startswith("process 2 is gone;")


def test_followers_find_that_process_0_is_gone(connected, lost):
    primary, _ = connected
    primary.close()
    reasons = {lost.get(timeout=PATIENCE_SECONDS) for _ in range(2)}
    assert reasons == {"process 0 is gone; all processes end, to be started again."}


def test_a_process_that_is_silent_is_lost(lost):
    """A stopped process keeps its connection open, and sends nothing."""
    ours, silent = socket.socketpair()
    with silent:
        Peer(ours, 3, 0.5, print, lost)
        reason = lost.get(timeout=PATIENCE_SECONDS)
        assert receive(silent) is HEARTBEAT
    assert reason.startswith("process 3 was silent for 0.5 s (heartbeat_timeout_seconds);")


def test_a_follower_asks_process_0_to_stop(connected):
    primary, (follower, _) = connected
    follower.request_stop()
    assert primary.stop_requested.wait(PATIENCE_SECONDS)


# ---- engines


class Recorded(FakeEngine):
    """Keeps what its steps returned."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.outputs = []

    def step(self):
        outputs = super().step()
        self.outputs += outputs
        return outputs


@pytest.fixture
def tokenizer(tiny_run):
    return load_tokenizer(tiny_run.data.tokenizer)


def test_followers_repeat_what_process_0_does(connected, tokenizer):
    primary, followers = connected
    engines = [Recorded(tokenizer) for _ in followers]
    threads = [
        threading.Thread(target=repeat_calls, args=pair)
        for pair in zip(engines, followers, strict=True)
    ]
    for thread in threads:
        thread.start()
    engine = ReplicatedEngine(Recorded(tokenizer), primary)
    for number in range(8):
        params = SamplingParams(max_tokens=4 + number, n=2, stop=("zz",), temperature=0.1)
        engine.submit(Request(f"{number}", (5, 6, number), params))
        if number % 3 == 1:
            engine.step()
    with pytest.raises(RequestError, match="is empty"):
        engine.submit(Request("empty", ()))
    outputs = list(engine.step())
    engine.cancel("3")
    engine.cancel("unknown")
    while engine.unfinished:
        outputs += engine.step()
    primary.end()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert [output.finish_reason for output in outputs if output.request_id == "3"][-1] in (
        "cancelled",
        "length",
    )
    for repeated in engines:
        assert repeated.outputs[-len(outputs) :] == outputs
        assert repeated.stats == engine.stats


def test_an_engine_that_differs_is_found(connected, tokenizer):
    primary, (follower, _) = connected
    engine = ReplicatedEngine(Recorded(tokenizer), primary)
    engine.submit(Request("a", (5, 6), SamplingParams(max_tokens=3)))
    for _ in range(2):
        engine.step()

    class Different(FakeEngine):
        def step(self):
            return []

    with pytest.raises(Lost, match="computed other tokens than process 0"):
        repeat_calls(Different(tokenizer), follower)


def test_a_request_survives_the_way_as_json():
    params = SamplingParams(
        temperature=1 / 3,
        stop=("a", "ä\n"),
        seed=2**64 - 1,
        banned_token_ids=(1, 2),
        logprobs=0,
        logit_bias={7: -1 / 3},
    )
    request = Request("key/0", (1, 2, 3), params)
    data = {"id": request.id, "prompt": request.prompt, "params": vars(params)}
    assert to_request(json.loads(json.dumps(data))) == request
