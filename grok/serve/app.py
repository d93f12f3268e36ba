"""The routes: OpenAI's completions, models, health, metrics, and a page to try it."""

import asyncio
import contextlib
import hashlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from grok.config.infer import ServeConfig
from grok.errors import RequestError
from grok.infer.openai.requests import CompletionRequest, RequestParser
from grok.infer.openai.responses import ResponseBuilder, error_response
from grok.serve.engine_thread import EngineFailed, EngineThread, Metrics, RequestHandle

# The page is one file and shows answers as text: it may load nothing and send nothing elsewhere.
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
)
CHAT_PATH = "/v1/chat/completions"
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
HEADERS = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}}
DISCONNECTED = 499  # as in nginx's log; nobody reads this response
ENGINE_FAILED = "the engine has broken down."


class HttpError(Exception):
    """A request that is refused, with the status and message of the response."""

    def __init__(self, status: int, message: str, parameter: str | None = None):
        super().__init__(message)
        self.status, self.parameter = status, parameter


HANDLED = (HttpError, RequestError, HTTPException, EngineFailed, ClientDisconnect)


def to_response(request: Request, error: Exception) -> Response:
    """The response to one of the HANDLED errors, with OpenAI's error body."""
    status, message, parameter = 400, str(error), getattr(error, "parameter", None)
    headers: Mapping[str, str] | None = None
    match error:
        case ClientDisconnect():
            return Response(status_code=DISCONNECTED)
        case HttpError():
            status = error.status
        case HTTPException():
            status, message = error.status_code, f"{error.detail}: {request.url.path:.200}"
            headers = error.headers
        case EngineFailed():
            status, message = 503, ENGINE_FAILED
    error_type = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    body = error_response(parameter, message, error_type)
    return JSONResponse(body, status, {**HEADERS.get(status, {}), **(headers or {})})


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
        self._keys = {_digest(key) for key in keys}
        self._timeout_message = f"the answer took more than the {config.max_seconds:g} s allowed."
        self._metrics = Metrics(engine)
        self._created = int(time.time())
        self._page = resources.files("grok.serve").joinpath("page.html").read_text()
        routes = [
            Route("/", self._show_page),
            Route("/health", self._health),
            Route("/metrics", self._show_metrics),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._models),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route(CHAT_PATH, self._complete, methods=["POST"]),
        ]
        # Against DNS rebinding: a browser here must not reach this server under another name.
        hosts = ["localhost", "127.0.0.1", "[::1]", config.host] if config.local else ["*"]
        self.asgi = Starlette(
            routes=routes,
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
            exception_handlers=dict.fromkeys(
                HANDLED, lambda request, error: self._counted(request, to_response(request, error))
            ),
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self._engine.start()
        yield
        self._engine.stop()

    # ---- small routes

    async def _show_page(self, _: Request) -> Response:
        return HTMLResponse(self._page, headers={"content-security-policy": PAGE_POLICY})

    async def _health(self, _: Request) -> Response:
        status = "failed" if self._engine.failed else "ok"
        return JSONResponse({"status": status}, 503 if self._engine.failed else 200)

    async def _show_metrics(self, request: Request) -> Response:
        self._check_key(request)
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        self._check_key(request)
        card = {"id": self._name, "object": "model", "created": self._created, "owned_by": "grok"}
        if "name" not in request.path_params:
            return JSONResponse({"object": "list", "data": [card]})
        self._check_model(request.path_params["name"])
        return JSONResponse(card)

    # ---- completions

    async def _complete(self, request: Request) -> Response:
        began = asyncio.get_running_loop().time()
        self._check_key(request)
        body = await self._body(request)
        parse = self._parser.chat if request.url.path == CHAT_PATH else self._parser.completion
        # Tokenizing a long prompt takes a while; other clients should not wait for it.
        parsed = await asyncio.to_thread(parse, body)
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
        return self._counted(request, JSONResponse(response))

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
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if self._keys and (scheme.lower() != "bearer" or _digest(key.strip()) not in self._keys):
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
        if self._engine.live >= self._config.max_queue:
            raise HttpError(429, "too many requests are under way; try again in a moment.")

    async def _body(self, request: Request) -> dict[str, Any]:
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise HttpError(415, "the header Content-Type should be application/json.")
        data, max_bytes = bytearray(), self._config.max_body_bytes
        try:
            async with asyncio.timeout(self._config.max_seconds):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > max_bytes:
                        raise HttpError(413, f"the body is larger than {max_bytes} bytes.")
        except TimeoutError:
            raise HttpError(408, "the body did not arrive in time.") from None
        try:
            body = json.loads(data.decode())
        except UnicodeDecodeError as error:
            raise HttpError(400, f"the body is not UTF-8 at byte {error.start}.") from None
        except (ValueError, RecursionError) as error:
            raise HttpError(400, f"the body is not JSON: {error}.") from None
        if not isinstance(body, dict):
            raise HttpError(400, "the body should be a JSON object.")
        return body

    # ---- responses

    def _counted(self, request: Request, response: Response) -> Response:
        known = {route.path for route in self.asgi.routes if isinstance(route, Route)}
        path = request.url.path if request.url.path in known else "other"
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


def _digest(key: str) -> bytes:
    """A hash, of equal length for all keys, so that comparing them takes constant time."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
