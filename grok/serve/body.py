"""Bodies of requests: read within limits, and parsed in threads."""

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.requests import Request

from grok.config.infer import ServeConfig
from grok.infer.openai.requests import CompletionRequest, RequestParser
from grok.serve.responses import HttpError

# Tokenizing a long prompt takes a while; other clients do not wait for it.
THREADS = 4


class BodyParser:
    """Reads and parses bodies. Those of chats have threads of their own: while a chat template
    takes all the time that it may, other completions go on. `parsing` is the number that have been
    read and not yet parsed."""

    def __init__(self, parser: RequestParser, config: ServeConfig):
        self._parser, self._max_bytes = parser, config.max_body_bytes
        self._timeout = config.http.body_timeout_seconds
        self._completions, self._chats = (
            ThreadPoolExecutor(THREADS, f"grok-{kind}") for kind in ("completions", "chats")
        )
        self.parsing = 0

    async def read(self, request: Request) -> bytes:
        """The bytes of a body. Raises HttpError where it is too large, or takes too long."""
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise HttpError(415, "the header Content-Type should be application/json.")
        data = bytearray()
        try:
            async with asyncio.timeout(self._timeout):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > self._max_bytes:
                        raise HttpError(413, f"the body is larger than {self._max_bytes} bytes.")
        except TimeoutError:
            raise HttpError(408, "the body did not arrive in time.") from None
        return bytes(data)

    async def parse(self, data: bytes, chat: bool) -> CompletionRequest:
        """The request in a body. Raises HttpError and RequestError for what cannot be read."""
        return await self.apply(
            RequestParser.chat if chat else RequestParser.completion, data, chat
        )

    async def apply[T](
        self, parse: Callable[[RequestParser, dict[str, Any]], T], data: bytes, chat: bool
    ) -> T:
        """The result of `parse` of a body. Raises HttpError, and whatever `parse` does."""
        pool = self._chats if chat else self._completions
        self.parsing += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(pool, lambda: parse(self._parser, _json_object(data)))
        finally:
            self.parsing -= 1

    def close(self) -> None:
        """Ends the threads."""
        self._completions.shutdown(wait=False, cancel_futures=True)
        self._chats.shutdown(wait=False, cancel_futures=True)


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        body = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise HttpError(400, f"the body is not UTF-8 at byte {error.start}.") from None
    except (ValueError, RecursionError) as error:
        problem = str(error).partition(";")[0]  # Python has advice of its own
        raise HttpError(400, f"the body is not JSON: {problem}.") from None
    if not isinstance(body, dict):
        raise HttpError(400, "the body should be a JSON object.")
    return body
