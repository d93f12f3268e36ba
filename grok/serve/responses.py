"""Responses of the server, and those that errors become."""

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from grok.errors import RequestError
from grok.infer.openai.responses import AnswerFailed, error_response, json_text
from grok.serve.engine_thread import EngineFailed

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
HEADERS = {
    401: {"www-authenticate": "Bearer"},
    408: {"connection": "close"},  # the rest of the body may still come
    429: {"retry-after": "1"},
}
DISCONNECTED = 499  # as in nginx's log; nobody reads this response
ENGINE_FAILED = "the engine has broken down."


class Json(JSONResponse):
    """A response of JSON that any text may be in."""

    def render(self, content: Any) -> bytes:
        """The bytes of the body."""
        return json_text(content).encode()


class HttpError(Exception):
    """A request that is refused, with the status and message of the response."""

    def __init__(self, status: int, message: str, parameter: str | None = None):
        super().__init__(message)
        self.status, self.parameter = status, parameter


# What becomes a response; Exception stands for faults of ours, which are logged as well.
HANDLED: tuple[type[Exception], ...] = (
    *(HttpError, RequestError, HTTPException),
    *(EngineFailed, AnswerFailed, ClientDisconnect, Exception),
)


def to_response(request: Request, error: Exception) -> Response:
    """The response to an error, with OpenAI's error body."""
    status, message, parameter = 400, str(error), getattr(error, "parameter", None)
    headers: Mapping[str, str] | None = None
    match error:
        case ClientDisconnect():
            return Response(status_code=DISCONNECTED)
        case HttpError():
            status = error.status
        case HTTPException():
            status, message = error.status_code, f"{error.detail}: {request.scope['path']:.200}"
            headers = error.headers
        case EngineFailed():
            status, message = 503, ENGINE_FAILED
        case AnswerFailed():
            status, message = 500, f"{message}."
        case RequestError():
            pass
        case _:
            status, message = 500, "the server failed at this request."
            headers = {"connection": "close"}  # uvicorn does, and logs the error
    error_type = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    body = error_response(parameter, message, error_type)
    return Json(body, status, {**HEADERS.get(status, {}), **(headers or {})})
