"""The interface of a server as an OpenAPI document. Fields of bodies come from the
tables that bodies are checked by, so what is described is what is read."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from grok import __version__
from grok.config.sampling import SamplingConfig
from grok.config.section import MAX_INT32
from grok.infer.openai.fields import CHAT, COMPLETION, Field
from grok.infer.openai.requests import RequestParser
from grok.infer.openai.tokenization import DETOKENIZE, TOKENIZE, TOKENIZE_CHAT
from grok.serve.answers import ANSWERS, ERROR, SCHEMAS

REFUSALS = {
    400: "a body that cannot be read, or asks for what cannot be; the message has what would work",
    401: "no key, or one that is none here",
    404: "another model",
    408: "a body that does not arrive in time",
    413: "a body that is too large",
    415: "no Content-Type application/json",
    429: "too many requests are under way",
    500: "a fault that is not the client's",
    503: "the engine has broken down",
    504: "an answer that takes too long",
}
TEXT_SHORT, PROMPT = "The import statement", {"role": "user", "content": "How many?"}


@dataclasses.dataclass(frozen=True)
class Operation:
    """A route: its answer by name, the tables of its body (several: one of them), an example of
    that, and whether it wants a key."""

    method: str
    summary: str
    answer: str
    tables: tuple[Mapping[str, Field], ...] = ()
    example: Mapping[str, Any] | None = None
    open: bool = False


TOKENS = "The tokens that a completion or a chat of this text or these messages begins with"
OPERATIONS = {
    "/v1/completions": Operation(
        "post",
        "Continue texts",
        "Completion",
        (COMPLETION,),
        {"prompt": TEXT_SHORT, "max_tokens": 40, "temperature": 0.7},
    ),
    "/v1/chat/completions": Operation(
        "post",
        "Answer a conversation",
        "ChatCompletion",
        (CHAT,),
        {"messages": [PROMPT], "max_tokens": 40, "stream": True},
    ),
    "/tokenize": Operation(
        "post", TOKENS, "Tokens", (TOKENIZE, TOKENIZE_CHAT), {"prompt": TEXT_SHORT}
    ),
    "/detokenize": Operation("post", "The text of tokens", "Text", (DETOKENIZE,), {"tokens": [42]}),
    "/v1/models": Operation("get", "The model's name, and what it can do", "Models"),
    "/v1/models/{name}": Operation("get", "The same of one model", "Model"),
    "/health": Operation("get", "Tell a load balancer whether answers come", "Health", open=True),
    "/metrics": Operation("get", "Counts and latencies, for Prometheus", "Metrics"),
    "/openapi.json": Operation("get", "This interface, as OpenAPI 3.1", "Document", open=True),
    "/docs": Operation("get", "This interface, as a page", "Page", open=True),
    "/": Operation("get", "A page to try the model", "Page", open=True),
}


def document(parser: RequestParser, wants_key: bool) -> dict[str, Any]:
    """The OpenAPI document of a server that parses bodies so."""
    schemas = dict(SCHEMAS)
    paths = {
        path: {operation.method: _operation(path, operation, parser, schemas)}
        for path, operation in OPERATIONS.items()
    }
    components: dict[str, Any] = {"schemas": schemas}
    if wants_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "grok serve",
            "version": __version__,
            "description": "OpenAI's completions and chat, and vLLM's tokenize and detokenize. In "
            "a body, null stands for a field that is not there; a field that is not listed is "
            "refused.",
        },
        "paths": paths,
        "components": components,
    }


def _operation(
    path: str, operation: Operation, parser: RequestParser, schemas: dict[str, Any]
) -> dict[str, Any]:
    content = ANSWERS[operation.answer]
    result: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {"200": {"description": "the answer", "content": content}},
    }
    if path == "/v1/models/{name}":
        name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
        result["parameters"] = [name]
    statuses = set() if operation.open else {401}
    if operation.tables:
        bodies = [_body_schema(table, parser, schemas) for table in operation.tables]
        schema = bodies[0] if len(bodies) == 1 else {"oneOf": bodies}
        media = {"schema": schema, "example": operation.example}
        result["requestBody"] = {"required": True, "content": {"application/json": media}}
        generates = path.startswith("/v1/")
        statuses |= REFUSALS.keys() if generates else REFUSALS.keys() - {503, 504}
        if CHAT in operation.tables and parser.chat_encoder is None:
            result["description"] = "Refused here: the model has no chat template."
    elif path == "/v1/models/{name}":
        statuses |= {404}
    elif path == "/health":
        statuses |= {503}
    for status in sorted(statuses):
        body = content if path == "/health" else {"application/json": {"schema": ERROR}}
        result["responses"][str(status)] = {"description": REFUSALS[status], "content": body}
    if not operation.open:
        result["security"] = [{"key": []}]
    return result


def _body_schema(
    table: Mapping[str, Field], parser: RequestParser, schemas: dict[str, Any]
) -> dict[str, Any]:
    """The schema of a body; schemas that it refers to are put among the others."""
    properties = {}
    for name, field in sorted(table.items(), key=lambda item: not item[1].required):
        template = "#/components/schemas/{model}"
        schema = field.adapter.json_schema(ref_template=template)
        schemas |= schema.pop("$defs", {})
        if name in DEFAULTS and table in (COMPLETION, CHAT):
            schema["default"] = getattr(parser.defaults, name)
        properties[name] = schema | {"description": field.meaning}
    chat = parser.chat_encoder
    if "tools" in properties and not (chat and chat.reads_tools):
        properties["tools"]["description"] += "; refused here: the model's template writes none"
    required = [name for name, field in table.items() if field.required]
    schema = {"type": "object", "properties": properties, "required": required}
    return schema | {"additionalProperties": False}


DEFAULTS = {field.name for field in dataclasses.fields(SamplingConfig)} - {"stop"}


def body_schemas(operation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The schemas that an operation's body may have."""
    if "requestBody" not in operation:
        return []
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    return schema.get("oneOf", [schema])


NAMES = {"string": "text", "boolean": "true or false", "integer": "integer", "number": "number"}
BOUNDS = {
    "minimum": "at least {:.10g}",
    "exclusiveMinimum": "above {:.10g}",
    "maximum": "at most {:.10g}",
    "minItems": "{} at least",
    "maxItems": "{} at most",
    "maxProperties": "{} at most",
}


def words(schema: Mapping[str, Any]) -> str:
    """The values that a JSON schema allows, in words."""
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    if "enum" in schema:
        return " or ".join(f'"{value}"' for value in schema["enum"])
    if "const" in schema:
        return f'"{schema["const"]}"'
    if "anyOf" in schema:
        kinds = [words(kind) for kind in schema["anyOf"] if kind.get("type") != "null"]
        return " or ".join(sorted(set(kinds), key=len))
    kind = schema.get("type")
    text = NAMES.get(str(kind), "anything")
    if kind == "array":
        text = f"list of {words(schema.get('items', {}))}"
    elif kind == "object":
        inner = schema.get("additionalProperties")
        text = f"object of {words(inner)}" if isinstance(inner, dict) else "object"
    bounds = [
        form.format(schema[name])
        for name, form in BOUNDS.items()
        if name in schema and abs(schema[name]) < MAX_INT32  # more is a limit of all numbers
    ]
    return ", ".join([text, *bounds])
