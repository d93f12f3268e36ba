"""Whatever is sent, the server answers it, and never with a fault of its own. More of it:

GROK_FUZZ_REQUESTS=100000 pytest -n 0 tests/serve/test_fuzz.py
"""

import asyncio
import json
import os
from typing import Any

import hypothesis
import pytest

from grok.config.infer import ServeConfig
from grok.data.chat.encoder import ChatEncoder
from grok.data.chat.template import ChatTemplate
from grok.data.tokenizers import load_tokenizer
from grok.infer.openai.requests import RequestParser
from grok.serve.app import App
from grok.serve.engine_thread import EngineThread
from tests.infer.fake_engine import FakeEngine
from tests.serve.fuzz import requests
from tests.serve.served import TEMPLATE

FEW = 250  # always the same ones
WITH_TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}" + TEMPLATE
EXAMPLES = int(os.environ.get("GROK_FUZZ_REQUESTS", FEW))


class Client:
    """Asks an application directly, in an event loop of its own."""

    def __init__(self, app: App, engine_thread: EngineThread):
        self._app, self._thread = app, engine_thread
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._start())

    async def _start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._thread.stop()
        self._loop.close()

    def ask(self, method: str, path: str, headers: dict[str, str], content: bytes):
        """Status, headers and body of the response."""
        return self._loop.run_until_complete(self._ask(method, path, headers, content))

    async def _ask(self, method, path, headers, content) -> tuple[int, dict[bytes, bytes], bytes]:
        messages: list[dict[str, Any]] = []
        sent = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if not sent.is_set():
                sent.set()
                return {"type": "http.request", "body": content, "more_body": False}
            await asyncio.Event().wait()  # the client stays
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            messages.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(errors="replace"),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.encode(), text.encode("latin-1")) for name, text in headers.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        async with asyncio.timeout(60):
            await self._app.asgi(scope, receive, send)
        body = b"".join(message.get("body", b"") for message in messages[1:])
        return messages[0]["status"], dict(messages[0]["headers"]), body


@pytest.fixture(scope="module")
def client(tiny_run):
    tokenizer = load_tokenizer(tiny_run.data.tokenizer)
    config = ServeConfig(weights="runs/tiny", max_body_bytes=20_000)
    thread = EngineThread(FakeEngine(tokenizer), lambda error: None)
    chat = ChatEncoder(ChatTemplate(WITH_TOOLS, "chat_template"), tokenizer)
    parser = RequestParser(tokenizer, config.sampling, 128, chat, config.max_choices)
    client = Client(App(config, "tiny", thread, parser, []), thread)
    yield client
    client.close()


def test_no_request_is_a_fault_of_the_server(client):
    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=EXAMPLES == FEW,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(requests())
    def check(request: dict[str, Any]) -> None:
        status, headers, body = client.ask(**request)
        assert status < 500, body
        kind = headers.get(b"content-type", b"").partition(b";")[0]
        if kind == b"application/json" and body:
            answer = json.loads(body, parse_constant=no_constant)
            assert status < 400 or answer["error"]["message"]
        elif kind == b"text/event-stream":
            *events, done, end = body.decode().split("\n\n")
            assert (done, end) == ("data: [DONE]", "")
            for event in events:
                answer = json.loads(event.removeprefix("data: "), parse_constant=no_constant)
                assert "error" not in answer
        assert client._thread.live == 0
        assert not client._thread.failed

    check()


def no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
