"""The routes: OpenAI's completions, tokens, models, health, metrics, and pages to read and try."""

import asyncio
import contextlib
import hashlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route

from grok.config.infer import ServeConfig
from grok.infer.openai.requests import CompletionRequest, RequestParser
from grok.infer.openai.responses import AnswerFailed, ResponseBuilder, error_response
from grok.infer.openai.tokenization import detokenize, tokenize
from grok.serve import openapi, pages
from grok.serve.body import BodyParser
from grok.serve.engine_thread import EngineFailed, EngineThread, Metrics, RequestHandle
from grok.serve.responses import ENGINE_FAILED, HANDLED, HttpError, Json, to_response

# The page is one file and shows answers as text: it may load nothing and send nothing elsewhere.
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
)
CHAT_PATH, DETOKENIZE_PATH = "/v1/chat/completions", "/detokenize"


class _Stream(StreamingResponse):
    """A response whose `stack` is unwound after it, or when the client disconnects."""

    def __init__(self, events: AsyncIterator[str], stack: contextlib.AsyncExitStack):
        super().__init__(events, media_type="text/event-stream")
        self._stack = stack

    async def __call__(self, *args: Any) -> None:
        async with self._stack:
            await super().__call__(*args)


class App:
    """The HTTP application of one served model, as `asgi`."""

    def __init__(
        self,
        config: ServeConfig,
        name: str,
        engine: EngineThread,
        parser: RequestParser,
        keys: Sequence[str],
    ):
        """`name` is the model's; without `keys` anyone who reaches the server is answered."""
        self._config, self._name, self._engine, self._parser = config, name, engine, parser
        self._bodies = BodyParser(parser, config)
        self._keys = {_digest(key.encode(errors="surrogateescape")) for key in keys}
        self._timeout_message = f"the answer took more than the {config.max_seconds:g} s allowed."
        self._metrics = Metrics(engine)
        self._created = int(time.time())
        self._document = openapi.document(parser, bool(self._keys))
        texts = {"/": pages.model_page(), "/docs": pages.interface_page(self._document)}
        self._pages = {
            path: HTMLResponse(text, headers={"content-security-policy": PAGE_POLICY})
            for path, text in texts.items()
        }
        routes = [
            *(Route(path, self._show_page) for path in texts),
            Route("/openapi.json", self._describe),
            Route("/health", self._health),
            Route("/metrics", self._show_metrics),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._models),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route(CHAT_PATH, self._complete, methods=["POST"]),
            Route("/tokenize", self._convert, methods=["POST"]),
            Route(DETOKENIZE_PATH, self._convert, methods=["POST"]),
        ]
        # Against DNS rebinding: a browser here must not reach this server under another name.
        hosts = ["localhost", "127.0.0.1", "[::1]", config.host] if config.local else ["*"]
        self.asgi = Starlette(
            routes=routes,
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
            exception_handlers=dict.fromkeys(HANDLED, self._refuse),
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self._engine.start()
        yield
        self._engine.stop()
        self._bodies.close()

    # ---- small routes

    async def _show_page(self, request: Request) -> Response:
        return self._pages[request.scope["path"]]

    async def _describe(self, _: Request) -> Response:
        return Json(self._document)

    async def _health(self, _: Request) -> Response:
        status = "failed" if self._engine.failed else "ok"
        return Json({"status": status}, 503 if self._engine.failed else 200)

    async def _show_metrics(self, request: Request) -> Response:
        self._check_key(request)
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        self._check_key(request)
        card = {"id": self._name, "object": "model", "created": self._created, "owned_by": "grok"}
        chat = self._parser.chat_encoder
        card["max_model_len"] = self._parser.context_length
        card["capabilities"] = {
            "completion_chat": chat is not None,
            "function_calling": chat is not None and chat.reads_tools,
        }
        if "name" not in request.path_params:
            return Json({"object": "list", "data": [card]})
        self._check_model(request.path_params["name"])
        return Json(card)

    # ---- tokens

    async def _convert(self, request: Request) -> Response:
        to_text = request.scope["path"] == DETOKENIZE_PATH
        body = await self._read(request)
        # Beside chats, whose templates are read here as well.
        answer = await self._bodies.apply(detokenize if to_text else tokenize, body, not to_text)
        self._check_model(answer.model or self._name)
        return self._counted(request, Response(answer.body, media_type="application/json"))

    # ---- completions

    async def _read(self, request: Request) -> bytes:
        """The body of a request that is let in."""
        self._check_key(request)
        body = await self._bodies.read(request)
        if self._engine.live + self._bodies.parsing >= self._config.max_queue:
            raise HttpError(429, "too many requests are under way; try again in a moment.")
        return body

    async def _complete(self, request: Request) -> Response:
        began = asyncio.get_running_loop().time()
        body = await self._read(request)
        parsed = await self._bodies.parse(body, chat=request.scope["path"] == CHAT_PATH)
        self._check_limits(parsed)
        key = secrets.token_hex(12)
        builder = ResponseBuilder(parsed, self._parser.tokenizer)
        head = parsed.head(key, int(time.time()), self._name)
        async with contextlib.AsyncExitStack() as stack:
            requests = parsed.requests(key, secrets.randbits(63))
            handle = await stack.enter_async_context(self._engine.submit(requests))
            await handle.next()  # accepted, or RequestError
            if parsed.stream:
                events = self._events(handle, builder, head, began)
                return self._counted(request, _Stream(events, stack.pop_all()))
            await _unless_disconnected(request, self._gather(handle, builder, began))
        response = {**head, "choices": builder.choices(), "usage": builder.usage()}
        return self._counted(request, Json(response))

    async def _gather(self, handle: RequestHandle, builder: ResponseBuilder, began: float) -> None:
        try:
            async with asyncio.timeout_at(began + self._config.max_seconds):
                while not builder.finished:
                    self._add(await handle.next(), builder, began)
        except TimeoutError:
            raise HttpError(504, self._timeout_message) from None

    async def _events(
        self, handle: RequestHandle, builder: ResponseBuilder, head: dict[str, Any], began: float
    ) -> AsyncIterator[str]:
        include_usage = builder.request.include_usage
        usage = {"usage": None} if include_usage else {}
        try:
            while not builder.finished:
                async with asyncio.timeout_at(began + self._config.max_seconds):
                    choices = self._add(await handle.next(), builder, began)
                if choices:
                    yield _event({**head, "choices": choices, **usage})
        except TimeoutError:
            yield _event(error_response(None, self._timeout_message, "timeout_error"))
        except EngineFailed:
            yield _event(error_response(None, ENGINE_FAILED, "server_error"))
        except AnswerFailed as error:
            yield _event(error_response(None, f"{error}.", "server_error"))
        if include_usage:
            yield _event({**head, "choices": [], "usage": builder.usage()})
        yield "data: [DONE]\n\n"

    def _add(self, output: Any, builder: ResponseBuilder, began: float) -> list[dict[str, Any]]:
        seconds = asyncio.get_running_loop().time() - began
        first = builder.tokens == 0 and not any(builder.finish_reasons)
        choices = builder.add(output)
        if first:
            self._metrics.first_token.observe(seconds)
        if builder.finished:
            self._metrics.duration.observe(seconds)
        return choices

    # ---- checks

    def _check_key(self, request: Request) -> None:
        # As bytes: a key in UTF-8 is read as Latin-1 by the library, as the standard has it.
        header = request.headers.get("authorization", "").encode("latin-1")
        scheme, _, key = header.partition(b" ")
        if self._keys and (scheme.lower() != b"bearer" or _digest(key.strip()) not in self._keys):
            raise HttpError(401, "the header Authorization should be `Bearer KEY`, of a key here.")

    def _check_model(self, name: str) -> None:
        if name != self._name:
            message = f"there is no model {name!r:.80} here; there is {self._name}."
            raise HttpError(404, message, "model")

    def _check_limits(self, parsed: CompletionRequest) -> None:
        self._check_model(parsed.model or self._name)
        longest, most = max(map(len, parsed.prompts)), self._config.max_prompt_tokens
        if 0 < most < longest:
            message = f"a prompt has {longest} tokens; {most} at most are read here."
            raise HttpError(400, message, "messages" if parsed.chat else "prompt")

    # ---- responses

    async def _refuse(self, request: Request, error: Exception) -> Response:
        return self._counted(request, to_response(request, error))

    def _counted(self, request: Request, response: Response) -> Response:
        known = {route.path for route in self.asgi.routes if isinstance(route, Route)}
        path = path if (path := request.scope["path"]) in known else "other"
        self._metrics.requests.labels(path, response.status_code).inc()
        return response


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, None]) -> None:
    """Does `work`, and cancels it when the client disconnects first. Raises ClientDisconnect."""

    async def disconnect() -> None:  # the body was read already
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, disconnected = asyncio.ensure_future(work), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait({task, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        task.result()
    finally:
        task.cancel()
        disconnected.cancel()


def _event(data: dict[str, Any]) -> str:
    # In ASCII: many clients split text into lines, and Unicode has more line ends than events do.
    return f"data: {json.dumps(data)}\n\n"


def _digest(key: bytes) -> bytes:
    """A hash, of equal length for all keys, so that comparing them takes constant time."""
    return hashlib.sha256(key).digest()
