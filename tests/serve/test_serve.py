"""`grok serve` over loopback, asked by OpenAI's client and by others that mean no good."""

import codecs
import contextlib
import dataclasses
import json
import re
import signal
import threading
from types import SimpleNamespace

import httpx
import openai
import pytest

from grok.config.infer import HttpConfig, ServeConfig
from grok.config.load import from_dict
from grok.config.sampling import SamplingConfig
from grok.data.tokenizers import Tokenizer, load_tokenizer
from grok.errors import RESTART, ConfigError, EngineError, RequestError
from grok.infer.loader import find_chat
from grok.infer.openai.requests import RequestParser
from grok.infer.openai.responses import ResponseBuilder
from grok.infer.request import Output, TokenLogprobs
from grok.serve.server import HttpFront, bind, make_server, read_keys
from grok.serve.watchdog import Watchdog
from tests.fixtures.chat_templates import make_release
from tests.infer.fake_engine import FakeEngine
from tests.serve.served import KEY, serving, wait_until


@pytest.fixture(scope="module")
def tokenizer(tiny_run) -> Tokenizer:
    return load_tokenizer(tiny_run.data.tokenizer)


@pytest.fixture(scope="module")
def server(tokenizer):
    limits = {"max_body_bytes": 4000, "max_prompt_tokens": 100, "max_choices": 4, "max_queue": 2}
    with serving(tokenizer, [KEY, "another"], **limits) as server:
        yield server


# ---- what is asked as OpenAI's client asks it


def test_a_completion(server):
    request = {"model": "tiny", "prompt": "The number 4", "max_tokens": 6, "seed": 5}
    answer = server.client.completions.create(**request, n=2, logprobs=2, echo=True)
    assert (answer.object, answer.model) == ("text_completion", "tiny")
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(choice.text.startswith("The number 4") for choice in answer.choices)
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens).startswith("The number 4")
    assert logprobs.token_logprobs[0] is None
    assert logprobs.text_offset[:2] == [0, len(logprobs.tokens[0])]
    assert len(logprobs.top_logprobs[-1]) == 2
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == 12 + answer.usage.prompt_tokens
    assert server.client.completions.create(**request).choices[0].finish_reason == "length"


def test_a_stream_adds_up_to_what_is_not_streamed(server):
    request = {"model": "tiny", "prompt": ["The", "A"], "max_tokens": 20, "seed": 5, "logprobs": 0}
    complete = server.client.completions.create(**request)
    texts, tokens, usage = ["", ""], [[], []], None
    stream = server.client.completions.create(
        **request, stream=True, stream_options={"include_usage": True}
    )
    for part in stream:
        usage = part.usage or usage
        for choice in part.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
    assert texts == [choice.text for choice in complete.choices]
    assert tokens == [choice.logprobs.tokens for choice in complete.choices]
    assert usage == complete.usage


def test_log_probabilities_of_a_prompt_come_before_answers_that_were_faster(server, tokenizer):
    parser = RequestParser(tokenizer, SamplingConfig(), 128)
    request = parser.completion({"prompt": [40, 41], "n": 3, "echo": True, "logprobs": 0})
    builder = ResponseBuilder(request, tokenizer)

    def output(choice: int, token: int, prompt: tuple | None = None) -> Output:
        logprobs = (TokenLogprobs(token, -1.0),)
        return Output("key/0", choice, (token,), "x", logprobs, prompt)

    assert builder.add(output(1, 50)) == []
    assert builder.add(output(1, 51)) == []
    choices = builder.add(output(0, 60, (None, TokenLogprobs(41, -2.0))))
    assert [choice["index"] for choice in choices] == [0, 1]
    assert [choice["text"] for choice in choices] == [
        request.texts[0] + text for text in ("x", "xx")
    ]
    known = [choice["logprobs"]["token_logprobs"] for choice in choices]
    assert known == [[None, -2.0, -1.0], [None, -2.0, -1.0, -1.0]]
    (last,) = builder.add(output(2, 70))
    assert last["logprobs"]["token_logprobs"] == [None, -2.0, -1.0]
    (more,) = builder.add(output(2, 71))
    assert more["logprobs"]["token_logprobs"] == [-1.0]


def test_experts_that_tokens_went_to(server):
    request = {"model": "tiny", "prompt": "The", "max_tokens": 5, "extra_body": {"experts": True}}
    (choice,) = server.client.completions.create(**request, seed=1).choices
    assert len(choice.experts) == 4  # the last token was not run
    experts = []
    for part in server.client.completions.create(**request, seed=1, stream=True):
        experts += part.choices[0].experts
    assert experts == choice.experts
    (without,) = server.client.completions.create(**GOOD).choices
    assert "experts" not in without.model_extra


def test_chat(server):
    messages = [{"role": "user", "content": "How many?"}]
    request = {"model": "tiny", "messages": messages, "max_completion_tokens": 7, "seed": 1}
    answer = server.client.chat.completions.create(**request, logprobs=True, top_logprobs=3)
    assert answer.choices[0].message.role == "assistant"
    (first, *_) = answer.choices[0].logprobs.content
    assert (first.logprob, len(first.top_logprobs)) == (-0.5, 3)
    text = ""
    for part in server.client.chat.completions.create(**request, stream=True):
        assert part.object == "chat.completion.chunk"
        text += part.choices[0].delta.content or ""
    assert text == answer.choices[0].message.content
    prompt = "user: How many?\nassistant:"
    plain = server.client.completions.create(model="tiny", prompt=prompt, max_tokens=7, seed=1)
    assert plain.choices[0].text == text


def test_chat_by_the_template_beside_the_tokenizer(tmp_path):
    pieces = load_tokenizer(make_release("mistral", tmp_path))
    chat = find_chat("", pieces)
    parser = RequestParser(pieces, SamplingConfig(), 128, chat)
    talk = [{"role": "user", "content": "The number"}]
    request = parser.chat({"messages": talk})
    assert request.texts == ("<s>[INST] The number [/INST]",)
    assert request.prompts[0].count(pieces.bos_id) == 1
    assert request.params.stop_token_ids == (pieces.eos_id,)
    parts = [{"type": "text", "text": "The "}, {"type": "text", "text": "number"}]
    assert parser.chat({"messages": [{"role": "user", "content": parts}]}) == request
    with pytest.raises(RequestError, match=r"^Conversation roles must alternate .*\.$"):
        parser.chat({"messages": [*talk, *talk]})
    with pytest.raises(RequestError, match="half of a surrogate pair"):
        parser.chat({"messages": [{"role": "user", "content": "\ud800"}]})
    assert find_chat("", load_tokenizer(make_release("grok-1", tmp_path / "other"))) is None
    with pytest.raises(RequestError, match="there is none beside the tokenizer; `prompt`, or chat"):
        RequestParser(pieces, SamplingConfig(), 128).chat({"messages": talk})


def test_the_blank_that_a_template_has_before_an_answer_is_not_in_it(tmp_path):
    pieces = load_tokenizer(make_release("grok-1", tmp_path))
    parser = RequestParser(pieces, SamplingConfig(), 128, find_chat("grok-1", pieces))
    request = parser.chat({"messages": [{"role": "user", "content": "The number"}], "n": 2})
    builder = ResponseBuilder(request, pieces)
    deltas = ["", "", ""]
    for choice, text in ((0, ""), (0, " a"), (1, "b"), (0, " c"), (1, " d")):
        for part in builder.add(Output("key/0", choice, (50,), text)):
            deltas[part["index"]] += part["delta"]["content"]
    assert deltas == ["a c", "b d", ""]
    assert [choice["message"]["content"] for choice in builder.choices()] == ["a c", "b d"]


def test_scores_of_a_text_alone(server):
    answer = server.client.completions.create(
        model="tiny", prompt="The number 4", max_tokens=0, echo=True, logprobs=1
    )
    (choice,) = answer.choices
    assert choice.text == "The number 4"
    assert len(choice.logprobs.tokens) == answer.usage.prompt_tokens
    assert answer.usage.completion_tokens == 0


def test_without_a_seed_each_answer_is_another(server):
    request = {"model": "tiny", "prompt": "The", "max_tokens": 20}
    texts = {server.client.completions.create(**request).choices[0].text for _ in range(2)}
    assert len(texts) == 2


def test_models_health_metrics_and_page(server):
    assert [model.id for model in server.client.models.list()] == ["tiny"]
    assert server.client.models.retrieve("tiny").owned_by == "grok"
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    server.client.completions.create(model="tiny", prompt="The", max_tokens=3)
    metrics = server.http.get("/metrics").text
    count = re.search(r'grok_requests_total\{code="200",path="/v1/completions"\} (\S+)', metrics)
    assert count
    assert float(count[1]) >= 1
    assert float(re.search(r"\ngrok_tokens_out_total (\S+)", metrics)[1]) >= 3
    assert "grok_time_to_first_token_seconds_count" in metrics
    page = httpx.get(server.url)
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert re.findall(r"(?:src|href)=\"(.*?)\"", page.text) == ["data:,", "docs"]
    assert not re.search(r"@import|url\(|https?://", page.text)


# ---- what is refused

GOOD = {"model": "tiny", "prompt": "The", "max_tokens": 2}


def body(**changes) -> dict:
    return {"json": {**GOOD, **changes}}


BAD = {
    "no key": (401, "Bearer KEY", {"headers": {"Authorization": ""}, **body()}),
    "a wrong key": (401, "Bearer KEY", {"headers": {"Authorization": "Bearer x"}, **body()}),
    "another scheme": (401, "Bearer KEY", {"headers": {"Authorization": f"Basic {KEY}"}, **body()}),
    "another host": (400, None, {"headers": {"Host": "evil.example"}, **body()}),
    "no such route": (404, "/v1/embeddings", {"path": "/v1/embeddings", **body()}),
    "another method": (405, "Method Not Allowed", {"method": "GET"}),
    "no JSON type": (415, "should be application/json", {"content": b"{}"}),
    "no JSON": (400, "not JSON", {"data": b'{"prompt": '}),
    "not UTF-8": (400, "not UTF-8 at byte 12", {"data": b'{"prompt": "\xff"}'}),
    "nested too deeply": (400, "not JSON", {"data": b"[" * 3900}),
    "no object": (400, "should be a JSON object", {"json": [GOOD]}),
    "too large": (413, "larger than 4000 bytes", body(prompt="x" * 4000)),
    "digits without end": (
        400,
        "temperature=1000",
        {"data": b'{"prompt": "The", "temperature": 1%b}' % (b"0" * 400)},
    ),
    "a penalty beyond 32 bits": (400, "at most 3e+38", body(presence_penalty=1e39)),
    "a number beyond 64 bits": (400, "at most 1", {"data": b'{"prompt": "a", "min_p": 1e999}'}),
    "a name of half a surrogate": (
        400,
        "there is no parameter '\\ud800'",
        {"data": b'{"prompt": "The", "\\ud800": 1}'},
    ),
    "a model of half a surrogate": (
        404,
        "there is no model '\\ud800'",
        {"data": b'{"prompt": "The", "model": "\\ud800"}'},
    ),
    "a stop of half a surrogate": (
        400,
        "valid Unicode",
        {"data": b'{"prompt": "The", "stop": "\\ud800"}'},
    ),
    "more stop texts than are compared": (400, "a list of 64 at most", body(stop=["a"] * 65)),
    "a host that is no address": (400, None, {"headers": {"Host": "localhost:["}, **body()}),
    "another model": (404, "there is no model 'gpt-4'", body(model="gpt-4")),
    "no prompt": (400, "prompt should be a text", {"json": {"model": "tiny"}}),
    "an empty prompt": (400, "the prompt is empty", body(prompt="")),
    "a prompt of another kind": (400, "prompt should be a text", body(prompt={"text": "The"})),
    "a token that is none": (400, "not from 0 to 319", body(prompt=[320])),
    "too long a prompt": (400, "100 at most are read", body(prompt=[40] * 101)),
    "too long an answer": (400, "longer than the model's context", body(max_tokens=128)),
    "too many answers": (400, "4 would work", body(n=5)),
    "a parameter out of range": (400, "top_p=1.5 must be at most 1", body(top_p=1.5)),
    "a parameter of another type": (
        400,
        "temperature='hot' must be a number",
        body(temperature="hot"),
    ),
    "not a number": (
        400,
        "temperature=nan must be",
        {"data": b'{"prompt": "The", "temperature": NaN}'},
    ),
    "an unknown parameter": (400, "there is no parameter 'suffix'", body(suffix="x")),
    "a stream of the best": (400, "cannot be streamed", body(stream=True, best_of=2)),
    "half a surrogate": (400, "half of a surrogate", {"data": b'{"prompt": "\\ud800"}'}),
    "chat without messages": (
        400,
        "messages should be a list",
        {"path": "/v1/chat/completions", "json": {"model": "tiny"}},
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_requests(server, kind):
    status, words, request = BAD[kind]
    request = {"method": "POST", "path": "/v1/completions", **request}
    if "data" in request:
        request["content"] = request.pop("data")
        request["headers"] = {"Content-Type": "application/json"}
    answer = server.http.request(request.pop("method"), request.pop("path"), **request)
    assert answer.status_code == status, answer.text
    if words is not None:
        error = answer.json()["error"]
        assert words in error["message"]
        assert error["type"]
    assert server.engine_thread.live == 0
    good = server.http.post("/v1/completions", json=GOOD)
    assert good.status_code == 200


def test_what_the_client_makes_of_refusals(server):
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.completions.create(**{**GOOD, "temperature": -1})
    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("gpt-4")


def test_more_requests_than_the_queue_holds_are_sent_away(server):
    server.engine.gate.clear()
    streams = [server.client.completions.create(**GOOD, stream=True) for _ in range(2)]
    with pytest.raises(openai.RateLimitError, match="try again in a moment") as caught:
        server.client.completions.create(**GOOD)
    assert caught.value.response.headers["retry-after"] == "1"
    server.engine.gate.set()
    assert [len(list(stream)) for stream in streams] == [2, 2]
    wait_until(lambda: server.engine_thread.live == 0)


def test_null_stands_for_a_parameter_that_is_not_there(server):
    open_ones = {"logit_bias": None, "stop": None, "seed": None}
    answer = server.http.post("/v1/completions", json={**GOOD, **open_ones})
    assert answer.json()["usage"]["completion_tokens"] == 2


def test_another_method_is_refused_with_the_right_one(server):
    answer = server.http.get("/v1/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def test_asked_to_stop_it_says_so_and_asked_again_ends_at_once(server, monkeypatch, capfd):
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    stopping = make_server(server.app, HttpConfig())
    stopping.handle_exit(signal.SIGTERM, None)
    assert stopping.should_exit
    assert handlers == dict.fromkeys((signal.SIGINT, signal.SIGTERM), signal.SIG_DFL)
    assert "stopping when requests under way are answered" in capfd.readouterr().err


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_is_cancelled_when_its_client_disconnects(server, stream):
    server.engine.gate.clear()
    server.engine.cancelled.clear()
    request = {"json": {**GOOD, "max_tokens": 100, "stream": stream}, "timeout": 0.3}
    leaving = server.http.stream("POST", "/v1/completions", **request)
    with contextlib.suppress(httpx.ReadTimeout), leaving as answer:
        next(answer.iter_bytes())
    wait_until(lambda: server.engine_thread.live == 0)
    server.engine.gate.set()
    wait_until(lambda: server.engine.cancelled and server.engine.unfinished == 0)


def test_time_is_limited(tokenizer):
    with serving(tokenizer, [], max_seconds=0.3) as server:
        server.engine.gate.clear()
        with pytest.raises(openai.InternalServerError, match=r"more than the 0.3 s") as caught:
            server.client.completions.create(**GOOD)
        assert caught.value.status_code == 504
        with pytest.raises(openai.APIError, match=r"more than the 0.3 s"):
            list(server.client.completions.create(**GOOD, stream=True))


def test_an_engine_that_breaks_down(tokenizer):
    with serving(tokenizer, []) as server:
        server.engine.broken = True
        with pytest.raises(openai.InternalServerError, match="broken down"):
            server.client.completions.create(**GOOD)
        answer = httpx.get(f"{server.url}/health")
        assert (answer.status_code, answer.json()) == (503, {"status": "failed"})
        with pytest.raises(openai.InternalServerError, match="broken down"):
            server.client.completions.create(**GOOD)
        assert server.engine_thread.step_began is None  # nothing that a watchdog would end


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("host=0.0.0.0", "lets other machines in, and there are no keys"),
        ("port=70000", "port=70000 is no port"),
        ("api_keys_file=missing.txt", "missing.txt: cannot be read: No such file"),
        ("max_queue=0", "max_queue must be more than 0"),
    ],
)
def test_refused_configs(monkeypatch, override, words):
    monkeypatch.delenv("GROK_API_KEYS", raising=False)
    with pytest.raises(ConfigError, match=words):
        read_keys(from_dict({"weights": "w"}, "w", [override], ServeConfig))


def test_an_address_that_is_taken_or_none_is_refused_before_anything_slow():
    taken = bind(ServeConfig(weights="w", port=0))
    port = taken.getsockname()[1]
    with taken, pytest.raises(ConfigError, match=rf"port={port} cannot be listened on: Address al"):
        bind(ServeConfig(weights="w", port=port))
    with pytest.raises(ConfigError, match=r"host=203.0.113.1 port=0 cannot be listened on"):
        bind(ServeConfig(weights="w", host="203.0.113.1", port=0))


def test_keys_of_the_environment_and_of_a_file(monkeypatch, tmp_path):
    monkeypatch.setenv("GROK_API_KEYS", "one two")
    file = tmp_path / "keys"
    # As Windows' editors write it.
    file.write_bytes(b"\xef\xbb\xbf# of the team\r\nthree four\r\n\r\nfive\r\n")
    config = ServeConfig(weights="w", host="0.0.0.0", api_keys_file=str(file))
    assert read_keys(config) == ["one", "two", "three four", "five"]
    file.write_bytes(codecs.BOM_UTF8 + b"first\r\nsecond\r\n")
    assert read_keys(config) == ["one", "two", "first", "second"]


def test_what_comes_out_is_json_line_by_line(server):
    with server.http.stream("POST", "/v1/completions", json={**GOOD, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        assert json.loads(event.removeprefix("data: "))["object"] == "text_completion"


def test_a_stream_has_no_ends_of_lines_but_its_own(server):
    prompt = "a\u2028b\x85c"  # where clients that split text into lines would split, too
    request = {**GOOD, "prompt": prompt, "echo": True, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=request) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    texts = [json.loads(line)["choices"][0]["text"] for line in lines[:-1]]
    assert "".join(texts).startswith(prompt)


def test_the_first_key_of_a_file_with_a_byte_order_mark_is_let_in(tokenizer, tmp_path):
    (tmp_path / "keys").write_bytes("\ufeffschlüssel\r\nother\r\n".encode())
    keys = read_keys(ServeConfig(weights="w", api_keys_file=str(tmp_path / "keys")))
    with serving(tokenizer, keys) as server:
        for key, status in {"schlüssel": 200, "other": 200, "\ufeffschlüssel": 401}.items():
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == status
    (tmp_path / "keys").write_bytes("key".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"is not UTF-8 at byte 0; the same text as UTF-8"):
        read_keys(ServeConfig(weights="w", api_keys_file=str(tmp_path / "keys")))


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_inside_one_request_is_told_to_it_alone(server, monkeypatch, stream):
    step = server.engine.step

    def fail(outputs: list[Output]) -> list[Output]:
        return [
            dataclasses.replace(output, finish_reason="error", error="it cannot be decoded")
            if output.request_id.endswith("/1")
            else output
            for output in outputs
        ]

    monkeypatch.setattr(server.engine, "step", lambda: fail(step()))
    request = {**GOOD, "prompt": ["The", "A"], "stream": stream}
    answer = server.http.post("/v1/completions", json=request)
    assert answer.status_code == (200 if stream else 500)
    error = {"message": "it cannot be decoded.", "type": "server_error"}
    body = answer.text if stream else answer.json()
    if stream:
        events = [line.removeprefix("data: ") for line in body.splitlines() if line]
        body = json.loads(events[-2])
    assert error.items() <= body["error"].items()
    assert server.http.post("/v1/completions", json=GOOD).status_code == 200
    wait_until(lambda: server.engine_thread.live == 0)


@pytest.mark.parametrize("part", ["submit", "parse"])
def test_a_fault_of_the_server_is_a_response_and_not_the_end(server, monkeypatch, capfd, part):
    def fail(*_):
        raise ArithmeticError("no such sum")

    if part == "submit":
        monkeypatch.setattr(server.engine, "submit", fail)
    else:
        monkeypatch.setattr(RequestParser, "completion", fail)
    answer = server.http.post("/v1/completions", json=GOOD)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    monkeypatch.undo()
    assert server.http.post("/v1/completions", json=GOOD).status_code == 200
    assert server.engine_thread.live == 0


def test_a_server_whose_engine_breaks_down_ends_to_be_started_again(tokenizer, capfd):
    class Broken(FakeEngine):
        unfinished = 1

        def step(self):
            raise RuntimeError("out of memory")

    config = ServeConfig(weights="runs/tiny", port=0)
    parser = RequestParser(tokenizer, config.sampling, 128)
    model = SimpleNamespace(parser=lambda max_choices: parser)
    with pytest.raises(EngineError, match="the engine broke down: out of memory") as caught:
        HttpFront(config).serve(model, Broken(tokenizer), Watchdog(config), threading.Event())
    assert caught.value.exit_code == RESTART
    assert "RuntimeError: out of memory" in capfd.readouterr().err
