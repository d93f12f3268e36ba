"""Requests of any shape to the application of a server, made by hypothesis: right ones, with parts
of them replaced by what no client should send."""

import json
from typing import Any

from hypothesis import strategies as st

from grok.infer.openai.fields import CHAT, COMPLETION
from grok.infer.openai.tokenization import DETOKENIZE, TOKENIZE, TOKENIZE_CHAT

PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
CALL = {"id": "c", "type": "function", "function": {"name": "now", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
GOOD: list[dict[str, Any]] = [
    {"prompt": "The number", "max_tokens": 2},
    {"prompt": ["The", [40, 41]], "max_tokens": 2, "n": 2, "logprobs": 2, "echo": True},
    {"prompt": [40, 41, 42], "max_tokens": 0, "echo": True, "logprobs": 0},
    {"prompt": "A", "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}},
    {"messages": [{"role": "user", "content": "How many?"}], "max_completion_tokens": 2},
    {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": "<|x|> {{ 1 }}"},
        ],
        "max_tokens": 2,
        "logprobs": True,
        "top_logprobs": 3,
    },
    {"prompt": "B", "max_tokens": 4, "temperature": 0.7, "top_p": 0.9, "stop": ["x"], "seed": 3},
    {"prompt": "B", "max_tokens": 2, "logit_bias": {"5": -100, "40": 1.5}},
    {
        "messages": [
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c", "content": "12:00"},
        ],
        "tools": [TOOL],
        "tool_choice": "auto",
        "max_tokens": 2,
    },
    {"prompt": "The number", "add_special_tokens": False, "return_token_strs": True},
    {"messages": [{"role": "user", "content": "4?"}], "tools": [TOOL], "model": "tiny"},
    {"tokens": [40, 41, 1]},
]
ODD_TEXTS = ["", "\ud83d", "\x00", "a\u2028b", "\ufeff", "é" * 300, "</s>", "[INST]", "x" * 5000]
ODD_NUMBERS = [0, -1, 1e308, -1e-320, 5e-324, 2**31, 2**63, 2**64, 10**400, -(10**4000), 0.5, 1e39]
ODD_NUMBERS += [float("nan"), float("inf"), float("-inf")]


def deep() -> list:
    """Lists in lists, new ones: bodies are changed in place."""
    nested: list = []
    for _ in range(400):
        nested = [nested]
    return nested


texts = st.text(st.characters(codec=None), max_size=20) | st.sampled_from(ODD_TEXTS)
numbers = st.integers() | st.floats() | st.sampled_from(ODD_NUMBERS)
atoms = st.none() | st.booleans() | numbers | texts | st.builds(deep)
values = st.recursive(
    atoms,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)
FIELDS = COMPLETION | CHAT | TOKENIZE | TOKENIZE_CHAT | DETOKENIZE
names = st.sampled_from(sorted(FIELDS)) | texts


@st.composite
def bodies(draw) -> dict[str, Any]:
    """A right body of which a few fields are replaced, anywhere in it."""
    body = json.loads(json.dumps(draw(st.sampled_from(GOOD))))
    for _ in range(draw(st.integers(0, 3))):
        place: Any = body
        inner = [part for part in body.values() if isinstance(part, dict | list) and part]
        while inner and draw(st.booleans()):
            place = draw(st.sampled_from(inner))
            parts = place.values() if isinstance(place, dict) else place
            inner = [part for part in parts if isinstance(part, dict | list) and part]
        if isinstance(place, dict):
            place[draw(names)] = draw(values)
        else:
            place[draw(st.integers(0, len(place) - 1))] = draw(values)
    return body


@st.composite
def payloads(draw) -> bytes:
    """Bytes of a body: of JSON mostly, perhaps damaged."""
    data = json.dumps(draw(bodies() | values)).encode()
    damage = draw(st.sampled_from(["none"] * 6 + ["cut", "flip", "junk", "mark"]))
    if damage == "cut":
        return data[: draw(st.integers(0, len(data)))]
    if damage == "flip":
        position = draw(st.integers(0, len(data) - 1))
        return data[:position] + bytes([draw(st.integers(0, 255))]) + data[position + 1 :]
    if damage == "junk":
        return draw(st.binary(max_size=50))
    return b"\xef\xbb\xbf" + data if damage == "mark" else data


header_text = st.text(st.characters(codec="latin-1", exclude_characters="\r\n\0"), max_size=30)


@st.composite
def requests(draw) -> dict[str, Any]:
    """Method, path, headers and content of a request."""
    headers = {"content-type": "application/json", "host": "localhost"}
    for name in draw(
        st.lists(st.sampled_from(["content-type", "authorization", "host", "x-y"]), max_size=1)
    ):
        headers[name] = draw(header_text)
    odd_paths = ["/", "/metrics", "/health", "/v1/models", "/v1/models/%ff/..", "/v1/completions/"]
    odd_paths += ["/docs", "/openapi.json", "/tokenize/"]
    odd_paths += ["//[", "/\ud800", "/%00", "/v1/models/\ufeff"]
    return {
        "method": draw(st.sampled_from(["POST"] * 8 + ["GET", "PUT", "HEAD", "OPTIONS", "X"])),
        "path": draw(st.sampled_from([*PATHS * 8, *odd_paths])),
        "headers": headers,
        "content": draw(payloads()),
    }
