"""Hostile kinds of requests to a server, each as the bytes that a client sends, and the statuses
that are right answers to it. Where 0 is among these, the server may close the connection."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
ZEROS = "0" * 400
LONG = f"1{ZEROS}"  # digits of an integer that no float can hold
TLS_HELLO = bytes.fromhex("16030100a5010000a10303") + bytes(160)
HTTP_2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)


class Kind(NamedTuple):
    """A kind of request; with `leaves`, its client disconnects as soon as it has sent it."""

    name: str
    data: bytes
    statuses: tuple[int, ...] = (400,)
    leaves: bool = False


def post(body: bytes | str, path: str = COMPLETIONS, headers: str = "", length: int = -1) -> bytes:
    """A request to post a body of JSON."""
    data = body.encode(errors="surrogatepass") if isinstance(body, str) else body
    size = len(data) if length < 0 else length
    kind = "" if "content-type" in headers else "content-type: application/json\r\n"
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {size}\r\n{kind}{headers}\r\n"
    )
    return head.encode("latin-1") + data


def field(name: str, value: Any) -> str:
    """The text of a right body with one more field; `value` is JSON text, or data."""
    text = value if isinstance(value, str) else json.dumps(value)
    return f'{{"prompt": "The", "max_tokens": 4, "{name}": {text}}}'


def numbers() -> Iterator[Kind]:
    """Numbers at the limits of what devices hold, and beyond."""
    answered = {
        "temperature": ["1e20", "3e38", "1e-320", "5e-324", "0"],
        "presence_penalty": ["3e38", "-3e38"],
        "frequency_penalty": ["3e38", "-3e38"],
        "repetition_penalty": ["3e38", "1e-38", "5e-324"],
        "top_k": ["1000000000"],
        "top_p": ["5e-324", "0"],
        "min_p": ["1"],
    }
    for name, values in answered.items():
        for value in values:
            yield Kind(f"{name} of {value}", post(field(name, value)), (200,))
    refused = ["temperature", "frequency_penalty", "repetition_penalty", "top_p", "n", "best_of"]
    for name in [*refused, "seed", "logprobs", "min_tokens", "max_tokens"]:
        yield Kind(f"{name} of 401 digits", post(field(name, LONG)))
    yield Kind("a number of 5000 digits", post(field("seed", "1" * 5000)))
    for name, value in {"temperature": "NaN", "top_p": "-Infinity", "min_p": "1e999"}.items():
        yield Kind(f"{name} of {value}", post(field(name, value)))
    yield Kind("a thousand million answers", post(field("n", "1000000000")))


def texts() -> Iterator[Kind]:
    """Texts that are none, or too many, or too long."""
    half = '"\\ud83d"'
    yield Kind("half a surrogate pair as prompt", post(f'{{"prompt": {half}}}'))
    yield Kind("half a surrogate pair as stop", post(field("stop", half)))
    yield Kind("half a surrogate pair as name", post(f'{{"prompt": "a", {half}: 1}}'))
    yield Kind("half a surrogate pair as model", post(field("model", half)), (404,))
    yield Kind(
        "control characters", post('{"prompt": "\\u0000\\u0007\\u2028", "max_tokens": 2}'), (200,)
    )
    yield Kind("65 stop texts", post(field("stop", ["x"] * 65)))
    yield Kind("a stop text of 100,000 characters", post(field("stop", ["x" * 100_000])))
    yield Kind("64 long stop texts", post(field("stop", ["e" * 999 + "x"] * 64)), (200,))
    yield Kind("a megabyte of one letter", post(json.dumps({"prompt": "a" * 1_000_000})))
    yield Kind("300,000 tokens", post(json.dumps({"prompt": [5] * 300_000})))
    yield Kind("100,000 prompts", post(json.dumps({"prompt": [""] * 100_000})))
    yield Kind("more than the longest body", post(json.dumps({"prompt": "a" * (1 << 20)})), (413,))
    yield Kind("not UTF-8", post(b'{"prompt": "\xff\xfe"}'))
    yield Kind("UTF-16", post('{"prompt": "a"}'.encode("utf-16")))
    yield Kind("a byte-order mark", post('\ufeff{"prompt": "a", "max_tokens": 1}'), (200,))


def shapes() -> Iterator[Kind]:
    """JSON of other shapes."""
    yield Kind("lists 100,000 deep", post("[" * 100_000))
    yield Kind("objects 900 deep", post('{"prompt":' * 900 + "1" + "}" * 900))
    names = {f"n{i}": i for i in range(50_000)}
    yield Kind("50,000 unknown names", post(json.dumps({"prompt": "a", **names})))
    yield Kind("a list", post('["prompt"]'))
    yield Kind("half of a body", post('{"prompt": "a'))
    yield Kind("no JSON", post(bytes(range(128, 256))))
    yield Kind("200,000 banned tokens", post(field("banned_token_ids", [5] * 200_000)), (200,))
    yield Kind("an allowed token that is none", post(field("allowed_token_ids", f"[{LONG}]")))
    yield Kind("200,000 tokens of wrong type", post(field("banned_token_ids", ["a"] * 200_000)))
    biases = {str(token): 1 for token in range(50_000)}
    yield Kind("50,000 biases", post(field("logit_bias", biases)))
    yield Kind("a bias of 401 digits", post(field("logit_bias", f'{{"5": {LONG}}}')))
    yield Kind("a bias that is no number", post(field("logit_bias", '{"5": NaN}')))
    yield Kind("a bias of a token that is none", post(field("logit_bias", f'{{"{LONG}": 1}}')))
    yield Kind("biases at both limits", post(field("logit_bias", {"5": -100, "6": 1e2})), (200,))
    yield Kind("stream_options of wrong type", post(field("stream_options", [1])))
    yield Kind("true for a number", post(field("temperature", "true")))
    many = json.dumps({"messages": [{"role": "user", "content": ""}] * 20_000})
    yield Kind("20,000 messages", post(many, CHAT))
    odd = json.dumps({"messages": [{"role": {"a": []}, "content": "<|x|>{{ 1 }}{% raise %}"}]})
    yield Kind("messages of a strange role", post(odd, CHAT), (200, 400))
    yield Kind("messages that are numbers", post('{"messages": [1, 2]}', CHAT))


def tools() -> Iterator[Kind]:
    """Functions for templates, most of which write none."""
    talk = [{"role": "user", "content": "The"}]

    def chat(**fields: Any) -> bytes:
        return post(json.dumps({"messages": talk, "max_tokens": 2, **fields}), CHAT)

    tool = {"type": "function", "function": {"name": "f"}}
    nested: Any = 1
    for _ in range(400):
        nested = {"properties": nested}
    yield Kind("10,000 tools", chat(tools=[tool] * 10_000))
    yield Kind("a tool of 900 kB", chat(tools=[tool | {"x": "a" * 900_000}]))
    yield Kind("a tool 400 deep", chat(tools=[tool | {"x": nested}]), (200, 400))
    yield Kind("a tool that is no function", chat(tools=[{"type": "mcp"}]))
    yield Kind("a tool that must be called", chat(tools=[tool], tool_choice="required"))
    call = {"function": {"name": "f", "arguments": "[" * 100_000}}
    answer = {"role": "assistant", "tool_calls": [call]}
    yield Kind("arguments 100,000 deep", chat(messages=[answer]))


def tokens() -> Iterator[Kind]:
    """Texts to tokens and back."""
    yield Kind(
        "a megabyte to tokens", post(json.dumps({"prompt": "a" * 1_000_000}), TOKENIZE), (200,)
    )
    yield Kind("half a surrogate pair to tokens", post('{"prompt": "\\ud83d"}', TOKENIZE))
    yield Kind("tokens to tokens", post('{"prompt": [1, 2]}', TOKENIZE))
    yield Kind("300,000 tokens to text", post(json.dumps({"tokens": [5] * 300_000}), DETOKENIZE))
    yield Kind("a token of 401 digits to text", post(f'{{"tokens": [{LONG}]}}', DETOKENIZE))
    yield Kind("tokens that are texts", post(json.dumps({"tokens": ["a"] * 200_000}), DETOKENIZE))
    yield Kind("tokens of another model", post('{"tokens": [5], "model": "x"}', DETOKENIZE), (404,))


def protocol() -> Iterator[Kind]:
    """What is no HTTP, or not quite."""
    get = "GET /health HTTP/1.1\r\nhost: localhost\r\n"
    yield Kind(
        "a header of 100 kB", f"{get}x: {'a' * 100_000}\r\n\r\n".encode(), (0, 200, 400, 431)
    )
    headers = "".join(f"x{i}: 1\r\n" for i in range(10_000))
    yield Kind("10,000 headers", f"{get}{headers}\r\n".encode(), (0, 200, 400, 431))
    yield Kind("a path of 100 kB", f"GET /{'a' * 100_000} HTTP/1.1\r\n\r\n".encode(), (0, 400, 414))
    yield Kind("zeros", bytes(5000), (0, 400))
    yield Kind("TLS", TLS_HELLO + b"\r\n\r\n", (0, 400))
    yield Kind("HTTP/2", HTTP_2, (0, 400, 404, 405))
    yield Kind("HTTP/9.9", b"GET / HTTP/9.9\r\n\r\n", (0, 400, 505))
    yield Kind("no host", b"GET /health HTTP/1.1\r\n\r\n")
    yield Kind("another host", b"GET /health HTTP/1.1\r\nhost: evil.example\r\n\r\n")
    yield Kind("a host that is no address", b"GET / HTTP/1.1\r\nhost: localhost:[\r\n\r\n")
    yield Kind(
        "a path of odd bytes", b"GET /%00%ff%ed%a0%80 HTTP/1.1\r\nhost: localhost\r\n\r\n", (404,)
    )
    yield Kind("a length below 0", post("{}", headers="content-length: -5\r\n"))
    yield Kind("two lengths", post("{}", headers="content-length: 1\r\n"), (0, 400))
    chunked = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n"
    chunked += "content-type: application/json\r\n\r\n"
    yield Kind("a chunk that is none", f"{chunked}zz\r\n{{}}\r\n".encode(), (0, 400))
    yield Kind("a chunk without end", f"{chunked}{'f' * 16}\r\n{{".encode(), (0, 400), True)
    yield Kind("no content type", post("{}", headers="content-type: text/plain\r\n"), (415,))
    yield Kind(
        "a websocket", f"{get}connection: upgrade\r\nupgrade: websocket\r\n\r\n".encode(), (200,)
    )
    yield Kind("a hundred requests at once", f"{get}\r\n".encode() * 100, (200,))
    yield Kind("half a body, and gone", post("{", length=1000), (0,), True)
    yield Kind("an answer that is left", post(field("stream", "true")), (0, 200), True)
    gone = post(field("max_tokens", "64").replace('"max_tokens": 4, ', ""))
    yield Kind("an answer that is not awaited", gone, (0, 200), True)


KINDS = [*numbers(), *texts(), *shapes(), *tools(), *tokens(), *protocol()]
