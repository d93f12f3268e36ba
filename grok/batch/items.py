"""From a record of the input to a call, and from its answers to a line of the output.

A record is our own (`prompt` or `messages`, any parameter of the engine, an `id` of any kind), or
one of OpenAI's batch files (`custom_id`, `method`, `url`, `body`); its line is of the same kind.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from grok.data.prepare.records import BadRecord, parse_json_object
from grok.data.prepare.sources import RawRecord
from grok.errors import RequestError
from grok.infer.openai.requests import CHAT, COMPLETION, CompletionRequest, RequestParser
from grok.infer.openai.responses import ResponseBuilder, error_response
from grok.infer.request import Request

ENVELOPE = ("custom_id", "method", "url", "body")
COLUMNS = sorted({"id", *ENVELOPE, *COMPLETION, *CHAT})
COMPLETIONS_URL, CHAT_URL = "/v1/completions", "/v1/chat/completions"


@dataclasses.dataclass(frozen=True)
class BatchItem:
    """A record of the input: a call, or the `error` that stands in its place.

    `index` counts the requests of the job from 0; `id` is the record's own; `openai`: it is of a
    batch file of OpenAI's.
    """

    index: int
    id: Any
    openai: bool
    call: CompletionRequest | None
    error: RequestError | None = None

    def requests(self, job_seed: int) -> list[Request]:
        """The call's requests for the engine, seeded by the job and the record's place in it."""
        assert self.call is not None
        digest = hashlib.blake2b(f"{job_seed}/{self.index}".encode(), digest_size=8).digest()
        return self.call.requests(str(self.index), int.from_bytes(digest))

    def failed(self, error: RequestError) -> str:
        """The line that says why there is no answer."""
        body = error_response(error.parameter, str(error), "invalid_request_error")
        if self.openai:
            return _line(self._envelope(400, body))
        return _line({"index": self.index, "id": self.id, **body})

    def answered(self, answers: ResponseBuilder) -> str:
        """The line with the answers."""
        found = {"choices": answers.choices(), "usage": answers.usage()}
        if not self.openai:
            return _line({"index": self.index, "id": self.id, **found})
        chat = answers.request.chat
        body = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self.index}",
            "object": "chat.completion" if chat else "text_completion",
            # Not the time: a job that is done again gives the same bytes.
            "created": 0,
            "model": answers.request.model,
            **found,
        }
        return _line(self._envelope(200, body))

    def _envelope(self, status: int, body: dict[str, Any]) -> dict[str, Any]:
        response = {"status_code": status, "request_id": str(self.index), "body": body}
        name = {"id": f"batch_req_{self.index}", "custom_id": self.id}
        return {**name, "response": response, "error": None}


def read_item(index: int, record: RawRecord, reader: RequestParser) -> BatchItem:
    """The item of a record, whatever is in it."""
    name, openai = None, False
    try:
        data = _data(record)
        openai = "custom_id" in data or "body" in data
        name = data.get("custom_id" if openai else "id")
        return BatchItem(index, name, openai, _call(data, openai, reader))
    except BadRecord as problem:
        error = RequestError("record", f"the record {problem}.")
    except RequestError as problem:
        error = problem
    return BatchItem(index, name, openai, None, error)


def reason(error: RequestError) -> str:
    """What a failure is counted under: the parameter, or that there is no such."""
    known = {"record", "method", "url", "body", "custom_id", *COMPLETION, *CHAT}
    return error.parameter if error.parameter in known else "unknown parameter"


def _data(record: RawRecord) -> Mapping[str, Any]:
    if record.problem or record.data is None:
        raise BadRecord(record.problem)
    if isinstance(record.data, bytes):
        return parse_json_object(record.data)
    # Of a Parquet file every row has every column; what is null is not there.
    return {name: _number(value) for name, value in record.data.items() if value is not None}


def _number(value: Any) -> Any:
    """A value of Parquet: pandas writes whole numbers as floats where the column has nulls."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _call(data: Mapping[str, Any], openai: bool, reader: RequestParser) -> CompletionRequest:
    if openai:
        for name in data:
            if name not in ENVELOPE:
                raise RequestError(name, f"{name!r:.60} is none of {', '.join(ENVELOPE)}.")
        body = data.get("body")
        url = data.get("url")
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
    call = reader.chat(body) if chat else reader.completion(body)
    if call.stream:
        raise RequestError("stream", "stream should be false: the answers go to a file.")
    return call


def _line(data: dict[str, Any]) -> str:
    text = json.dumps(data, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        # An id with half of a surrogate pair, which only an escape can hold.
        return json.dumps(data)
    return text
