"""Limits on connections, by a clock that the tests hold, and on what waits for what."""

import asyncio
import resource
import socket
import threading
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from grok.config.infer import HttpConfig
from grok.config.sampling import SamplingParams
from grok.data.tokenizers import load_tokenizer
from grok.infer.request import Request
from grok.serve.connections import Connection, max_connections
from tests.serve.served import serving, wait_until

LIMITS = HttpConfig(max_connections=3, header_timeout_seconds=30, write_timeout_seconds=20)
GET = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"


class Pipe:
    """A transport whose other side takes what a test says."""

    def __init__(self):
        self.written, self.unread, self.aborted, self.closed = b"", 0, False, False

    def write(self, data: bytes) -> None:
        self.written += data

    def get_write_buffer_size(self) -> int:
        return self.unread

    def abort(self) -> None:
        self.aborted = True

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed or self.aborted

    def get_extra_info(self, name: str) -> None:
        return None

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading


@pytest.fixture
def connect():
    """Makes connections of one server, whose application answers once `gate` is set."""
    gate = asyncio.Event()

    async def app(scope, receive, send) -> None:
        await gate.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    settings = uvicorn.Config(app, http=Connection, ws="none", log_level="critical")
    settings.limits = LIMITS
    state = ServerState()

    def connect() -> tuple[Connection, Pipe]:
        connection, pipe = Connection(settings, state, {}), Pipe()
        connection.connection_made(pipe)
        return connection, pipe

    connect.gate = gate
    return connect


async def answered() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_headers_have_to_come_in_time(connect):
    async def talk() -> None:
        connect.gate.set()
        now = asyncio.get_running_loop().time()
        for sent in (b"", b"GET / HTTP/1.1\r\nX: "):
            connection, pipe = connect()
            connection.data_received(sent) if sent else None
            connection.check(now + 29)
            assert not pipe.aborted
            if sent:
                connection.data_received(b"y")  # a little more does not buy more time
            connection.check(now + 31)
            assert pipe.aborted
        # One that has had its answer waits for the library's limit of idle connections.
        connection, pipe = connect()
        connection.data_received(GET)
        await answered()
        assert pipe.written.endswith(b"ok\r\n0\r\n\r\n")
        connection.check(now + 31)
        assert not pipe.aborted
        connection.data_received(b"GET /")
        connection.check(now + 31)
        assert pipe.aborted

    asyncio.run(talk())


def test_a_client_that_takes_nothing_of_its_answer_is_left(connect):
    async def talk() -> None:
        now = asyncio.get_running_loop().time()
        connection, pipe = connect()
        connection.data_received(GET)
        connection.check(now + 1000)  # it is being answered
        assert not pipe.aborted
        for seconds, unread in enumerate((500, 400, 300, 200), start=1001):
            pipe.unread = unread
            connection.check(now + 20 * seconds)
            assert not pipe.aborted
        pipe.unread = 250
        connection.check(now + 20 * 1004 + 19)
        assert not pipe.aborted
        connection.check(now + 20 * 1004 + 21)
        assert pipe.aborted

    asyncio.run(talk())


def test_one_connection_too_many_takes_the_place_of_the_one_that_waits_longest(connect):
    async def talk() -> None:
        busy, busy_pipe = connect()
        busy.data_received(GET)
        await answered()
        idle = [connect() for _ in range(2)]
        _, late = connect()
        assert [pipe.aborted for _, pipe in idle] == [True, False]
        assert not (late.aborted or late.closed or busy_pipe.aborted)

    asyncio.run(talk())


def test_where_all_are_being_answered_one_more_is_told(connect):
    async def talk() -> None:
        pipes = []
        for _ in range(3):
            connection, pipe = connect()
            connection.data_received(GET)
            pipes.append(pipe)
        await answered()
        _, late = connect()
        assert b"503 Service Unavailable" in late.written
        assert b"too many connections" in late.written
        assert late.closed
        assert not any(pipe.is_closing() for pipe in pipes)

    asyncio.run(talk())


@pytest.mark.parametrize(
    ("soft", "hard", "most", "raised"),
    [
        (10_000, 10_000, 1000, None),
        (256, 256, 182, None),
        (256, 500, 426, 500),
        (256, resource.RLIM_INFINITY, 1000, 1074),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 1000, None),
    ],
)
def test_there_are_no_more_connections_than_descriptors(monkeypatch, soft, hard, most, raised):
    limits = [(soft, hard)]
    monkeypatch.setattr("os.listdir", lambda path: ["0"] * 10)
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.append(pair))
    assert max_connections(HttpConfig()) == most
    assert limits[-1] == (raised or soft, hard)


@pytest.fixture(scope="module")
def small_server(tiny_run):
    limits = HttpConfig(max_connections=10, body_timeout_seconds=0.2)
    with serving(load_tokenizer(tiny_run.data.tokenizer), [], http=limits) as server:
        yield server


def test_idle_connections_keep_nobody_out(small_server):
    address = small_server.address
    idle = [socket.create_connection(address) for _ in range(10)]
    for connection in idle:
        connection.sendall(b"GET / HTTP/1.1\r\nX: ")
    assert small_server.http.get("/health").json() == {"status": "ok"}
    for connection in idle:
        connection.close()


def test_a_body_has_to_come_in_time(small_server):
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n"
    with socket.create_connection(small_server.address) as connection:
        connection.sendall(head + b'content-type: application/json\r\n\r\n{"prompt"')
        answer = b"".join(iter(lambda: connection.recv(1000), b""))  # until it is closed
    assert b" 408 " in answer
    assert b"the body did not arrive in time" in answer


def test_slow_chat_templates_hold_up_chats_alone(small_server, monkeypatch):
    gate = threading.Event()
    parser = small_server.app._bodies._parser
    monkeypatch.setattr(type(parser), "chat", lambda self, body: gate.wait())
    chats = [socket.create_connection(small_server.address) for _ in range(8)]
    body = b'{"messages": [{"role": "user", "content": "x"}]}'
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n"
    for connection in chats:
        connection.sendall(head % len(body) + b"content-type: application/json\r\n\r\n" + body)
    wait_until(lambda: small_server.app._bodies.parsing == 8)
    answer = small_server.http.post("/v1/completions", json={"prompt": "The", "max_tokens": 2})
    gate.set()
    assert answer.status_code == 200
    for connection in chats:
        connection.close()


def test_an_answer_that_nobody_reads_holds_no_place_in_the_queue(small_server):
    """Once the engine has done its part."""
    thread: Any = small_server.engine_thread

    async def leave_unread() -> int:
        request = Request("unread", (40,), SamplingParams(max_tokens=3))
        async with thread.submit([request]) as handle:
            while thread.live:
                await asyncio.sleep(0.001)
            return handle.outputs.qsize()

    future = asyncio.run_coroutine_threadsafe(leave_unread(), thread._loop)
    assert future.result(timeout=20) == 4  # accepted, and three tokens
    assert thread.live == 0
