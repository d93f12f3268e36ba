"""The interface that a server describes is the one that it has."""

import json
import re
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from grok.data.tokenizers import load_tokenizer
from grok.infer.openai.fields import CHAT, COMPLETION
from grok.infer.openai.tokenization import DETOKENIZE, TOKENIZE
from grok.serve.openapi import words
from tests.serve.served import KEY, serving

TALK = [{"role": "user", "content": "How many?"}]
TYPES = {"string": str, "integer": int, "number": int | float, "boolean": bool}


@pytest.fixture(scope="module")
def server(tiny_run):
    with serving(load_tokenizer(tiny_run.data.tokenizer), [KEY]) as server:
        yield server


@pytest.fixture(scope="module")
def document(server) -> dict[str, Any]:
    return httpx.get(f"{server.url}/openapi.json").raise_for_status().json()


def matches(schema: dict[str, Any], value: Any, schemas: dict[str, Any]) -> bool:
    """True for a value as the schema describes it, without fields that the schema lacks."""
    if "$ref" in schema:
        return matches(schemas[schema["$ref"].rpartition("/")[2]], value, schemas)
    if "anyOf" in schema:
        return any(matches(kind, value, schemas) for kind in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return value in schema.get("enum", [schema.get("const")])
    kind = schema["type"]
    if kind == "array":
        return isinstance(value, list) and all(matches(schema["items"], i, schemas) for i in value)
    if kind != "object":
        return value is None if kind == "null" else isinstance(value, TYPES[kind])
    properties, other = schema.get("properties", {}), schema.get("additionalProperties")
    if not isinstance(value, dict) or not set(schema.get("required", ())) <= value.keys():
        return False
    inner = {key: properties.get(key, other) for key in value}
    return all(schema and matches(schema, value[key], schemas) for key, schema in inner.items())


def test_all_routes_are_described(server, document):
    routes = {
        (re.sub(r":path}", "}", route.path), method.lower())
        for route in server.app.asgi.routes
        if isinstance(route, Route)
        for method in route.methods - {"HEAD"}
    }
    paths = document["paths"]
    assert routes == {(path, method) for path, methods in paths.items() for method in methods}
    tables = {
        "/v1/completions": COMPLETION,
        "/v1/chat/completions": CHAT,
        "/detokenize": DETOKENIZE,
    }
    for path, table in tables.items():
        schema = body_schema(document, path)
        assert schema["properties"].keys() == table.keys()
        assert schema["additionalProperties"] is False
    assert body_schema(document, "/tokenize")["oneOf"][0]["properties"].keys() == TOKENIZE.keys()
    assert (
        "refused here"
        in body_schema(document, "/v1/chat/completions")["properties"]["tools"]["description"]
    )
    text = json.dumps(document)
    names = set(re.findall(r'"#/components/schemas/(\w+)"', text))
    assert names <= document["components"]["schemas"].keys()


def body_schema(document: dict[str, Any], path: str) -> dict[str, Any]:
    return document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]


ANSWERED = [
    ("POST", "/v1/completions", {"prompt": "A", "max_tokens": 2}),
    ("POST", "/v1/completions", {"prompt": "A", "max_tokens": 2, "logprobs": 1, "echo": True}),
    ("POST", "/v1/completions", {"prompt": "A", "max_tokens": 2, "experts": True}),
    ("POST", "/v1/chat/completions", {"messages": TALK, "max_tokens": 2}),
    (
        "POST",
        "/v1/chat/completions",
        {"messages": TALK, "max_tokens": 2, "logprobs": True, "top_logprobs": 1},
    ),
    ("POST", "/tokenize", {"prompt": "A"}),
    ("POST", "/tokenize", {"messages": TALK, "return_token_strs": True}),
    ("POST", "/detokenize", {"tokens": [40, 41]}),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/tiny", None),
    ("GET", "/health", None),
    ("POST", "/tokenize", {"prompt": 5}),
    ("POST", "/detokenize", {"tokens": [1], "model": "other"}),
    ("POST", "/v1/completions", {}),
]


@pytest.mark.parametrize(("method", "path", "body"), ANSWERED)
def test_answers_are_as_they_are_described(server, document, method, path, body):
    answer = server.http.request(method, path, json=body)
    described = path.replace("/tiny", "/{name}")
    operation = document["paths"][described][method.lower()]
    content = operation["responses"][str(answer.status_code)]["content"]
    schemas = document["components"]["schemas"]
    assert matches(content["application/json"]["schema"], answer.json(), schemas), answer.text
    if answer.status_code == 200 and "completions" in path:
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        *events, done = server.http.post(path, json=body | stream).text.split("\n\n")[:-1]
        assert done == "data: [DONE]"
        for event in events:
            data = json.loads(event.removeprefix("data: "))
            assert matches(content["text/event-stream"]["schema"], data, schemas), event


def test_what_is_refused_is_described(server, document):
    """Of each field, a value of a type that it does not have."""
    for path in ("/v1/completions", "/v1/chat/completions", "/detokenize"):
        schema = body_schema(document, path)
        good = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert server.http.post(path, json=good["example"]).status_code == 200
        for name, field in schema["properties"].items():
            odd = 5 if words(field).startswith(("text", "true", "list", "Stream", '"')) else "odd"
            if words(field) == "anything":
                continue
            answer = server.http.post(path, json=good["example"] | {name: odd})
            assert answer.status_code == 400, (name, odd)
            assert name in answer.json()["error"]["message"]


def test_the_page_shows_it_and_loads_nothing(server, document):
    answer = httpx.get(f"{server.url}/docs")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"src=|<script|@import|url\(", answer.text)
    assert set(re.findall(r'href="([^"#]+)"', answer.text)) == {"data:,", "openapi.json", "."}
    for path in document["paths"]:
        assert f'<h2 id="{path}">' in answer.text
    for name in COMPLETION | CHAT:
        assert f"<code>{name}</code>" in answer.text
    assert "Authorization: Bearer KEY" in answer.text
    anchors = set(re.findall(r'href="#([^"]+)"', answer.text))
    assert anchors <= set(re.findall(r'id="([^"]+)"', answer.text))


def test_capabilities_are_told(server):
    (card,) = server.http.get("/v1/models").json()["data"]
    assert card["capabilities"] == {"completion_chat": True, "function_calling": False}
    assert card["max_model_len"] == 128
