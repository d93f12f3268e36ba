"""Errors of a request as HTTP responses with OpenAI's error bodies."""

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from grok.errors import RequestError
from grok.infer.openai.responses import error_response
from grok.serve.engine_thread import EngineFailed

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
    """The response to one of the HANDLED errors."""
    match error:
        case HttpError():
            return _response(error.status, str(error), error.parameter)
        case RequestError():
            return _response(400, str(error), error.parameter)
        case HTTPException():
            response = _response(error.status_code, f"{error.detail}: {request.url.path:.200}")
            response.headers.update(error.headers or {})
            return response
        case EngineFailed():
            return _response(503, ENGINE_FAILED)
    return Response(status_code=DISCONNECTED)


def _response(status: int, message: str, parameter: str | None = None) -> Response:
    error_type = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    body = error_response(parameter, message, error_type)
    return JSONResponse(body, status, headers=HEADERS.get(status))
