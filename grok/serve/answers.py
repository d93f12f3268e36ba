"""The answers of a server as JSON schemas, for its OpenAPI document."""

from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}


def an_object(**properties: Schema) -> Schema:
    """The schema of an object that has all of these."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def list_of(items: Schema) -> Schema:
    """The schema of a list."""
    return {"type": "array", "items": items}


def or_null(schema: Schema) -> Schema:
    """The schema of a value that may be missing."""
    return {"anyOf": [schema, {"type": "null"}]}


def ref(name: str) -> Schema:
    """A reference to one of SCHEMAS."""
    return {"$ref": f"#/components/schemas/{name}"}


def described(schema: Schema, description: str) -> Schema:
    """The schema with its meaning."""
    return {**schema, "description": description}


ERROR = ref("Error")
FINISH = described(or_null(TEXT), "stop, length, or cancelled; null until the answer ends")
EXPERTS = described(
    list_of(list_of(list_of(INTEGER))), "of each token, in each layer, where experts are asked for"
)
TOKEN = an_object(token=TEXT, logprob=NUMBER, bytes=list_of(INTEGER))
COMPLETION_LOGPROBS = an_object(
    tokens=list_of(TEXT),
    token_logprobs=list_of(or_null(NUMBER)),
    top_logprobs=list_of(or_null({"type": "object", "additionalProperties": NUMBER})),
    text_offset=list_of(INTEGER),
)
CHAT_LOGPROBS = an_object(
    content=list_of(an_object(**TOKEN["properties"], top_logprobs=list_of(TOKEN)))
)
MESSAGE = an_object(role={"const": "assistant"}, content=TEXT)


def _choice(logprobs: Schema, **properties: Schema) -> Schema:
    choice = an_object(
        index=INTEGER, finish_reason=FINISH, logprobs=or_null(logprobs), **properties
    )
    choice["properties"]["experts"] = EXPERTS
    return choice


def _answer(kind: str, choice: Schema, usage: Schema) -> Schema:
    head = {"id": TEXT, "object": {"const": kind}, "created": INTEGER, "model": TEXT}
    answer = an_object(**head, choices=list_of(choice))
    return {**answer, "properties": {**answer["properties"], "usage": usage}}


USAGE = ref("Usage")
STREAM_USAGE = described(or_null(USAGE), "in the last event, where include_usage asks for it")
COMPLETION_CHOICE = _choice(COMPLETION_LOGPROBS, text=TEXT)
SCHEMAS: dict[str, Schema] = {
    "Usage": an_object(prompt_tokens=INTEGER, completion_tokens=INTEGER, total_tokens=INTEGER),
    "Completion": _answer("text_completion", COMPLETION_CHOICE, USAGE),
    "CompletionEvent": _answer("text_completion", COMPLETION_CHOICE, STREAM_USAGE),
    "ChatCompletion": _answer("chat.completion", _choice(CHAT_LOGPROBS, message=MESSAGE), USAGE),
    "ChatCompletionEvent": _answer(
        "chat.completion.chunk", _choice(CHAT_LOGPROBS, delta=MESSAGE), STREAM_USAGE
    ),
    "Tokens": an_object(
        count=INTEGER,
        max_model_len=described(INTEGER, "tokens of the longest prompt and answer"),
        tokens=list_of(INTEGER),
        token_strs=or_null(list_of(TEXT)),
    ),
    "Text": an_object(prompt=TEXT),
    "Model": an_object(
        id=TEXT,
        object={"const": "model"},
        created=INTEGER,
        owned_by=TEXT,
        max_model_len=described(INTEGER, "tokens of the longest prompt and answer"),
        capabilities=an_object(
            completion_chat=described({"type": "boolean"}, "there is a chat template"),
            function_calling=described({"type": "boolean"}, "the chat template writes tools"),
        ),
    ),
    "Models": an_object(object={"const": "list"}, data=list_of(ref("Model"))),
    "Health": an_object(status={"enum": ["ok", "failed"]}),
    "Error": an_object(
        error=an_object(message=TEXT, type=TEXT, param=or_null(TEXT), code={"type": "null"})
    ),
}
STREAM = (
    "with stream: events, the last of which is [DONE]; one with `error` in place of choices where "
    "the answer breaks off"
)


def _json(name: str) -> Schema:
    return {"application/json": {"schema": ref(name)}}


def _events(name: str) -> Schema:
    return {"text/event-stream": {"schema": described(ref(name), STREAM)}}


# The content of the answer 200, by the names that operations have for it.
ANSWERS: dict[str, Schema] = {
    **{name: _json(name) for name in ("Tokens", "Text", "Model", "Models", "Health")},
    "Completion": _json("Completion") | _events("CompletionEvent"),
    "ChatCompletion": _json("ChatCompletion") | _events("ChatCompletionEvent"),
    "Metrics": {"text/plain": {"schema": TEXT}},
    "Document": {"application/json": {"schema": {"type": "object"}}},
    "Page": {"text/html": {"schema": TEXT}},
}
