"""The routes: OpenAI's completions, models, health, metrics, and a page to try it."""

import asyncio
import contextlib
import hashlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from grok.config.serve import ServeConfig
from grok.data.tokenizers import Tokenizer
from grok.errors import RequestError
from grok.infer.openai.requests import CompletionRequest, RequestParser
from grok.infer.openai.responses import ResponseBuilder, error_response
from grok.serve.engine_thread import EngineFailed, EngineThread, RequestHandle
from grok.serve.prometheus import Metrics

# The page is one file, and what it shows of answers is text: nothing else may be loaded or sent.
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
)
KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class HttpError(Exception):
    """A request that is not answered: the status and what to say."""

    def __init__(self, status: int, message: str, parameter: str | None = None):
        super().__init__(message)
        self.status, self.parameter = status, parameter


class _Stream(StreamingResponse):
    """Server-sent events, after which, or once the client has left, `stack` is unwound."""

    def __init__(self, events: AsyncIterator[str], stack: contextlib.AsyncExitStack):
        super().__init__(events, media_type="text/event-stream")
        self._stack = stack

    async def __call__(self, *args: Any) -> None:
        async with self._stack:
            await super().__call__(*args)


class App:
    """What the routes need: `asgi` is the application."""

    def __init__(
        self,
        config: ServeConfig,
        name: str,
        engine_thread: EngineThread,
        reader: RequestParser,
        tokenizer: Tokenizer,
        keys: Sequence[str],
    ):
        """`name` is the model's; without `keys` anyone who reaches the server is answered."""
        self._config, self._name, self._engine_thread = config, name, engine_thread
        self._reader, self._tokenizer = reader, tokenizer
        self._keys = {_digest(key) for key in keys}
        self._metrics = Metrics(engine_thread)
        self._began = int(time.time())
        self._page = resources.files("grok.serve").joinpath("page.html").read_text()
        routes = [
            Route("/", self._show_page),
            Route("/health", self._health),
            Route("/metrics", self._show_metrics),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._models),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/v1/chat/completions", self._complete, methods=["POST"]),
        ]
        # A page elsewhere, whose name leads to this machine, is not let in by a browser here.
        hosts = ["localhost", "127.0.0.1", "[::1]", config.host] if config.local else ["*"]
        self.asgi = Starlette(
            routes=routes,
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
            exception_handlers={
                HttpError: self._refuse,
                RequestError: self._refuse_request,
                HTTPException: self._refuse_route,
                EngineFailed: self._refuse_broken,
                ClientDisconnect: self._note_left,
            },
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self._engine_thread.start()
        yield
        self._engine_thread.stop()

    # ---- small routes

    async def _show_page(self, _: Request) -> Response:
        return HTMLResponse(self._page, headers={"content-security-policy": PAGE_POLICY})

    async def _health(self, _: Request) -> Response:
        status = "failed" if self._engine_thread.failed else "ok"
        return JSONResponse({"status": status}, 503 if self._engine_thread.failed else 200)

    async def _show_metrics(self, request: Request) -> Response:
        self._check_key(request)
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        self._check_key(request)
        card = {"id": self._name, "object": "model", "created": self._began, "owned_by": "grok"}
        if "name" not in request.path_params:
            return JSONResponse({"object": "list", "data": [card]})
        self._check_model(request.path_params["name"])
        return JSONResponse(card)

    # ---- completions

    async def _complete(self, request: Request) -> Response:
        began = time.monotonic()
        self._check_key(request)
        body = await self._body(request)
        chat = request.url.path == "/v1/chat/completions"
        # Tokenising a long prompt takes a while that other clients should not wait.
        read = self._reader.chat if chat else self._reader.completion
        call = await asyncio.to_thread(read, body)
        self._check_model(call.model or self._name)
        longest = max(map(len, call.prompts))
        if 0 < self._config.max_prompt_tokens < longest:
            raise HttpError(
                400,
                f"a prompt has {longest} tokens; {self._config.max_prompt_tokens} at most are "
                "read here.",
                "messages" if chat else "prompt",
            )
        if self._engine_thread.live >= self._config.max_queue:
            raise HttpError(429, "too many requests are under way; try again in a moment.")
        key = secrets.token_hex(12)
        requests = call.requests(key, secrets.randbits(63))
        answers = ResponseBuilder(call, self._tokenizer)
        head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{key}",
            "object": _object(call),
            "created": int(time.time()),
            "model": self._name,
        }
        async with contextlib.AsyncExitStack() as stack:
            handle = await stack.enter_async_context(self._engine_thread.submit(requests))
            await handle.next()  # or its refusal
            if call.stream:
                events = self._events(handle, answers, head, began)
                return self._counted(request, _Stream(events, stack.pop_all()))
            await self._unless_left(request, self._gather(handle, answers, began))
        found = {**head, "choices": answers.choices(), "usage": answers.usage()}
        return self._counted(request, JSONResponse(found))

    async def _gather(self, handle: RequestHandle, answers: ResponseBuilder, began: float) -> None:
        try:
            async with asyncio.timeout_at(self._deadline(began)):
                while not answers.finished:
                    self._add(await handle.next(), answers, began)
        except TimeoutError:
            raise HttpError(504, self._too_long()) from None

    async def _events(
        self,
        handle: RequestHandle,
        answers: ResponseBuilder,
        head: dict[str, Any],
        began: float,
    ) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        call = answers.request
        usage = {"usage": None} if call.include_usage else {}
        try:
            while not answers.finished:
                async with asyncio.timeout_at(self._deadline(began)):
                    choices = self._add(await handle.next(), answers, began)
                if choices:
                    yield _event({**head, "choices": choices, **usage})
        except TimeoutError:
            yield _event(error_response(None, self._too_long(), "timeout_error"))
        except EngineFailed:
            yield _event(error_response(None, "the engine has broken down.", "server_error"))
        if call.include_usage:
            yield _event({**head, "choices": [], "usage": answers.usage()})
        yield "data: [DONE]\n\n"

    def _add(self, output: Any, answers: ResponseBuilder, began: float) -> list[dict[str, Any]]:
        seconds = time.monotonic() - began
        first = answers.tokens == 0 and not any(answers.finish_reasons)
        choices = answers.add(output)
        if first:
            self._metrics.first_token.observe(seconds)
        if answers.finished:
            self._metrics.duration.observe(seconds)
        return choices

    async def _unless_left(self, request: Request, work: Any) -> None:
        """Does `work`, and gives it up where the client leaves first. Raises ClientDisconnect."""
        task = asyncio.ensure_future(work)
        left = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientDisconnect
            task.result()
        finally:
            task.cancel()
            left.cancel()

    def _deadline(self, began: float) -> float:
        return (
            asyncio.get_running_loop().time()
            + self._config.max_seconds
            - (time.monotonic() - began)
        )

    def _too_long(self) -> str:
        return (
            f"the answer took more than the {self._config.max_seconds:g} s that it may take here."
        )

    # ---- checks

    def _check_key(self, request: Request) -> None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if self._keys and (scheme.lower() != "bearer" or _digest(key.strip()) not in self._keys):
            raise HttpError(401, "the header Authorization should be `Bearer KEY`, of a key here.")

    def _check_model(self, name: str) -> None:
        if name != self._name:
            raise HttpError(
                404, f"there is no model {name!r:.80} here; there is {self._name}.", "model"
            )

    async def _body(self, request: Request) -> dict[str, Any]:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise HttpError(415, "the header Content-Type should be application/json.")
        data, most = bytearray(), self._config.max_body_bytes
        try:
            async with asyncio.timeout(self._config.max_seconds):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > most:
                        raise HttpError(413, f"the body is larger than {most} bytes.")
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

    # ---- refusals

    def _refuse(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HttpError)
        return self._error(request, error.status, str(error), error.parameter)

    def _refuse_request(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return self._error(request, 400, str(error), error.parameter)

    def _refuse_route(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{error.detail}: {request.url.path:.200}"
        response = self._error(request, error.status_code, message)
        response.headers.update(error.headers or {})
        return response

    def _refuse_broken(self, request: Request, _: Exception) -> Response:
        return self._error(request, 503, "the engine has broken down.")

    def _note_left(self, request: Request, _: Exception) -> Response:
        # Nobody reads it; the number is that of nginx's log.
        return self._counted(request, Response(status_code=499))

    def _error(
        self, request: Request, status: int, message: str, parameter: str | None = None
    ) -> Response:
        kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
        headers = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}}.get(status)
        body = error_response(parameter, message, kind)
        return self._counted(request, JSONResponse(body, status, headers=headers))

    def _counted(self, request: Request, response: Response) -> Response:
        known = {route.path for route in self.asgi.routes if isinstance(route, Route)}
        path = request.url.path if request.url.path in known else "other"
        self._metrics.requests.labels(path, response.status_code).inc()
        return response


async def _left(request: Request) -> None:
    """Waits until the client has left; of its body nothing is left to read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _object(call: CompletionRequest) -> str:
    if not call.chat:
        return "text_completion"
    return "chat.completion.chunk" if call.stream else "chat.completion"


def _event(data: dict[str, Any]) -> str:
    # In ASCII: many clients split text into lines, and Unicode has more ends of lines than events.
    return f"data: {json.dumps(data)}\n\n"


def _digest(key: str) -> bytes:
    """Of equal length for all keys, so that comparing them takes the same time."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
