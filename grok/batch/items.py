"""From a record of the input to a request, and from its answers to a line of the output. A record
is our own (`prompt` or `messages`, any sampling parameter, an `id` of any type), or one of OpenAI's
batch files (`custom_id`, `method`, `url`, `body`); its line is of the same kind."""

import contextlib
import dataclasses
import hashlib
import traceback
from collections.abc import Mapping
from typing import Any

from grok.data.prepare.sources import RawRecord
from grok.data.prepare.values import BadRecord, in_json, parse_json_object
from grok.errors import RequestError
from grok.infer.openai.fields import CHAT, COMPLETION
from grok.infer.openai.requests import CompletionRequest, RequestParser
from grok.infer.openai.responses import ResponseBuilder, error_response, json_text
from grok.infer.request import Request

ENVELOPE = ("custom_id", "method", "url", "body")
COLUMNS = sorted({"id", *ENVELOPE, *COMPLETION, *CHAT})
INTERNAL = "internal error"
EXACT_FLOATS = 2**53
COMPLETIONS_URL, CHAT_URL = "/v1/completions", "/v1/chat/completions"


@dataclasses.dataclass(frozen=True)
class BatchItem:
    """A record of the input: a request, or the `error` in its place."""

    index: int  # among the job's records, from 0
    id: Any  # the record's own
    openai: bool  # from an OpenAI batch file
    request: CompletionRequest | None
    error: Exception | None = None

    def engine_requests(self, job_seed: int) -> list[Request]:
        """Requests for the engine, seeded by the job and the record's index in it."""
        assert self.request is not None
        digest = hashlib.blake2b(f"{job_seed}/{self.index}".encode(), digest_size=8).digest()
        return self.request.requests(str(self.index), int.from_bytes(digest))

    def error_line(self, error: Exception) -> str:
        """The output line that says why there is no answer; the client is not to blame for any but
        a RequestError."""
        if isinstance(error, RequestError):
            body = error_response(error.parameter, str(error), "invalid_request_error")
            return self._line(400, body)
        message = str(error) or type(error).__name__
        return self._line(500, error_response(None, message, "server_error"))

    def answer_line(self, builder: ResponseBuilder) -> str:
        """The output line with the answers."""
        body = {"choices": builder.choices(), "usage": builder.usage()}
        if self.openai:
            # Not the time: a shard that is computed again gives the same bytes.
            body = builder.request.head(str(self.index), 0, builder.request.model) | body
        return self._line(200, body)

    def _line(self, status: int, body: dict[str, Any]) -> str:
        line = {"index": self.index, "id": self.id, **body}
        if self.openai:
            response = {"status_code": status, "request_id": str(self.index), "body": body}
            line = {"id": f"batch_req_{self.index}", "custom_id": self.id, "response": response}
            line["error"] = None
        return json_text(line)


def id_of(record: RawRecord) -> Any:
    """The id of a record, None where it has none or cannot be read."""
    with contextlib.suppress(BadRecord, RecursionError):
        data = _data(record)
        return in_json(data.get("custom_id", data.get("id")))
    return None


def read_item(index: int, record: RawRecord, parser: RequestParser) -> BatchItem:
    """The item of a record, whatever is in it: what cannot be parsed is an item with an error."""
    record_id, openai = None, False
    try:
        data = _data(record)
        openai = "custom_id" in data or "body" in data
        record_id = in_json(data.get("custom_id" if openai else "id"))
        return BatchItem(index, record_id, openai, _parse(data, openai, parser))
    except BadRecord as problem:
        error = RequestError("record", f"the record {problem}.")
    except RequestError as problem:
        error = problem
    except Exception as problem:  # a fault of ours, with this record alone
        traceback.print_exception(problem)
        return BatchItem(index, record_id, openai, None, problem)
    return BatchItem(index, record_id, openai, None, error)


def failure_key(error: Exception) -> str:
    """The name that a failure is counted under: its parameter, if there is such a one."""
    if not isinstance(error, RequestError):
        return INTERNAL
    known = {"record", "method", "url", "body", "custom_id", *COMPLETION, *CHAT}
    return error.parameter if error.parameter in known else "unknown parameter"


def _data(record: RawRecord) -> Mapping[str, Any]:
    if record.problem or record.data is None:
        raise BadRecord(record.problem)
    if isinstance(record.data, bytes):
        return parse_json_object(record.data)
    # Rows of Parquet have every column: null stands for a field that is not there, and pandas
    # writes integers as floats where the column has nulls, which are exact up to 2^53.
    return {
        name: int(value) if _is_integer(value) else value
        for name, value in record.data.items()
        if value is not None
    }


def _is_integer(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer() and abs(value) <= EXACT_FLOATS


def _parse(data: Mapping[str, Any], openai: bool, parser: RequestParser) -> CompletionRequest:
    if openai:
        for name in [name for name in data if name not in ENVELOPE]:
            raise RequestError(name, f"{name!r:.60} is none of {', '.join(ENVELOPE)}.")
        url, body = data.get("url"), data.get("body")
        if data.get("method") != "POST":
            raise RequestError("method", "method should be POST.")
        if url not in (COMPLETIONS_URL, CHAT_URL):
            raise RequestError("url", f"url should be {COMPLETIONS_URL} or {CHAT_URL}.")
        if not isinstance(body, dict):
            raise RequestError("body", "body should be an object.")
        chat = url == CHAT_URL
    else:
        body = {name: value for name, value in data.items() if name != "id"}
        chat = "messages" in body
    request = parser.chat(body) if chat else parser.completion(body)
    if request.stream:
        raise RequestError("stream", "stream should be false: the answers go to a file.")
    return request
