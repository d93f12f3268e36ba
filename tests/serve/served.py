"""A server in this process, with an engine without a model that tests hold and break."""

import contextlib
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import openai

from grok.config.infer import ServeConfig
from grok.data.chat.encoder import ChatEncoder
from grok.data.chat.template import ChatTemplate
from grok.data.tokenizers import Tokenizer
from grok.infer.openai.requests import RequestParser
from grok.serve.app import App
from grok.serve.engine_thread import EngineThread
from grok.serve.server import bind, make_server
from tests.infer.fake_engine import FakeEngine

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
KEY = "correct horse"


class Gated(FakeEngine):
    """Steps only while its gate is open, and breaks down on demand."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(tokenizer)
        self.gate = threading.Event()
        self.gate.set()
        self.broken = False
        self.cancelled: set[str] = set()

    def step(self):
        if self.broken:
            raise RuntimeError("out of memory")
        return super().step() if self.gate.wait(0.01) else []

    def cancel(self, request_id: str) -> None:
        self.cancelled.add(request_id)
        super().cancel(request_id)


@contextlib.contextmanager
def serving(tokenizer: Tokenizer, keys: list[str], **settings) -> Iterator[SimpleNamespace]:
    config = ServeConfig(weights="runs/tiny", port=0, **settings)
    engine = Gated(tokenizer)
    failures: list[BaseException] = []
    engine_thread = EngineThread(engine, failures.append)
    parser = RequestParser(
        tokenizer,
        config.sampling,
        128,
        ChatEncoder(ChatTemplate(TEMPLATE, "chat_template"), tokenizer),
        config.max_choices,
    )
    app = App(config, "tiny", engine_thread, parser, keys)
    server, listener = make_server(app, config.http), bind(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    wait_until(lambda: server.started)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    client = openai.OpenAI(api_key=KEY, base_url=f"{url}/v1", max_retries=0)
    http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"})
    with client, http:
        yield SimpleNamespace(
            client=client,
            http=http,
            engine=engine,
            engine_thread=engine_thread,
            url=url,
            app=app,
            address=listener.getsockname(),
        )
        engine.gate.set()
    server.should_exit = True
    thread.join()


def wait_until(reached) -> None:
    until = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < until
        time.sleep(0.005)
