"""Requests at the limits of numbers, and faults inside one: none reaches another request."""

import dataclasses

import jax
import numpy as np
import pytest

import grok
from grok.config import EngineConfig
from grok.config.sampling import SamplingParams
from grok.data.tokenizers import load_tokenizer
from grok.errors import GrokError, RequestError
from grok.infer.engine import Engine
from grok.infer.interactive import TextTurns, stream
from grok.infer.request import Output, Request

MODEL_VOCAB = 512  # of which the tokenizer has 320, as checkpoints pad their tables
HUGE, TINY = 3e38, 1e-45
PROMPT = (40, 41, 42)
# Answers of two tokens at least, so that penalties have something to act on.
EXTREMES = [
    {"temperature": HUGE},
    {"temperature": 1e20, "top_k": 400},
    {"temperature": 1e20, "top_p": 0.999, "min_p": 0.5},
    {"temperature": TINY},
    {"temperature": 1e-30, "top_p": TINY, "min_p": 1.0},
    {"frequency_penalty": -HUGE, "presence_penalty": HUGE},
    {"frequency_penalty": HUGE, "presence_penalty": -HUGE, "temperature": 0},
    {"repetition_penalty": HUGE, "frequency_penalty": HUGE},
    {"repetition_penalty": TINY, "frequency_penalty": -HUGE, "temperature": HUGE},
    {"temperature": 1e20, "min_tokens": 20, "top_k": 10**9},
]


class Brittle:
    """A tokenizer that fails at one of its tokens."""

    def __init__(self, tokenizer, token: int):
        self._tokenizer, self._token = tokenizer, token

    def __getattr__(self, name: str):
        return getattr(self._tokenizer, name)

    def piece_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        if token_id == self._token:
            raise ArithmeticError(f"token {token_id} is cursed")
        return self._tokenizer.piece_bytes(token_id, first=first)


@pytest.fixture(scope="module")
def tokenizer(tiny_run):
    return load_tokenizer(tiny_run.data.tokenizer)


@pytest.fixture(scope="module")
def engine(tiny_run, tokenizer) -> Engine:
    mesh = grok.make_mesh(devices=jax.devices()[:1])
    config = dataclasses.replace(tiny_run.model, vocab_size=MODEL_VOCAB)
    options = EngineConfig(max_num_seqs=4, page_size=16, prefill_chunk_size=32, num_pages=32)
    model = grok.init(config, jax.random.key(3), mesh)
    return Engine(model, Brittle(tokenizer, 300), mesh, options)


def ask(engine: Engine, *requests: Request) -> dict[str, list[Output]]:
    """Outputs of requests that run side by side."""
    outputs: dict[str, list[Output]] = {request.id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.unfinished:
        for output in engine.step():
            outputs[output.request_id].append(output)
    return outputs


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def request(name: str, prompt: tuple[int, ...] = PROMPT, **params) -> Request:
    return Request(name, prompt, SamplingParams(**{"max_tokens": 20, "seed": 7} | params))


def test_no_number_lets_a_banned_token_be_drawn(engine, tokenizer):
    allowed = tuple(range(10, 30))
    requests = [
        request(f"{i}", allowed_token_ids=allowed, **extreme) for i, extreme in enumerate(EXTREMES)
    ]
    requests += [
        request(f"all {i}", ignore_eos=True, banned_token_ids=(300,), **extreme)
        for i, extreme in enumerate(EXTREMES)
    ]
    outputs = ask(engine, *requests)
    for name, outs in outputs.items():
        assert outs[-1].finish_reason == "length", name
        assert set(tokens(outs)) <= set(range(320) if name.startswith("all") else allowed), name
    # A temperature beyond all reason draws from all tokens alike, one near 0 the likeliest.
    assert len(set(tokens(outputs["0"]))) > 8
    greedy = ask(engine, request("greedy", allowed_token_ids=allowed, temperature=0))["greedy"]
    assert tokens(outputs["3"]) == tokens(outputs["4"]) == tokens(greedy)


def test_likeliest_tokens_are_ones_that_the_tokenizer_has(engine):
    wide = {"logprobs": 20, "prompt_logprobs": 20, "max_tokens": 8, "banned_token_ids": (300,)}
    outputs = ask(engine, request("a", ignore_eos=True, **wide))["a"]
    entries = [entry for output in outputs for entry in output.logprobs]
    entries += [entry for output in outputs for entry in (output.prompt_logprobs or ())[1:]]
    listed = [token for entry in entries for token, _ in entry.top]
    assert len(listed) > 20
    assert max(listed) < 320


def test_a_fault_in_one_request_ends_it_alone(engine, capfd):
    good = request("good", temperature=0, banned_token_ids=(300,))
    expected = tokens(ask(engine, good)["good"])
    # One fails at its first token, one as the best of several, one when it is submitted.
    bad = request("bad", allowed_token_ids=(300, 5), min_tokens=19, ignore_eos=True)
    best = request("best", allowed_token_ids=(300, 5), n=1, best_of=3, ignore_eos=True)
    outputs = ask(engine, bad, good, best)
    for name in ("bad", "best"):
        last = outputs[name][-1]
        assert (last.finish_reason, last.error) == ("error", "token 300 is cursed")
        assert sum(output.finish_reason is not None for output in outputs[name]) == 1
    assert tokens(outputs["good"]) == expected
    assert "ArithmeticError" in capfd.readouterr().err
    with pytest.raises(ArithmeticError):
        engine.submit(request("prompt", (4, 300), n=3))
    assert (engine.unfinished, engine.stats.waiting, engine.stats.pages_used) == (0, 0, 0)
    with pytest.raises(GrokError, match="token 300 is cursed"):
        list(engine.generate([bad]))
    assert tokens(ask(engine, good)["good"]) == expected


def test_log_probabilities_that_are_not_finite_are_told(engine, capfd):
    good = request("good", temperature=0, banned_token_ids=(300,))
    expected = tokens(ask(engine, good)["good"])
    model = engine._model
    engine._model = jax.tree.map(lambda array: array * np.float32("nan"), model)
    try:
        outputs = ask(engine, request("a", max_tokens=4), request("b", prompt_logprobs=0))
    finally:
        engine._model = model
    assert [outputs[name][-1].finish_reason for name in "ab"] == ["error", "error"]
    assert "not finite; its weights may be damaged" in outputs["a"][-1].error
    # What the pages held is passed on to nobody.
    assert tokens(ask(engine, good)["good"]) == expected


def test_a_prompt_of_the_whole_context_is_scored_without_a_new_token(engine, tiny_run):
    length = tiny_run.model.context_length
    prompt = tuple(4 + i % 200 for i in range(length))
    scoring = {"prompt_logprobs": 1, "logprobs": 1, "max_tokens": 0}
    before = engine.stats.tokens_out
    outputs = ask(
        engine, request("full", prompt, **scoring), request("less", prompt[:-1], **scoring)
    )
    (full,), (less,) = outputs["full"], outputs["less"]
    assert (full.finish_reason, full.token_ids, full.text) == ("length", (), "")
    assert len(full.prompt_logprobs) == length
    assert full.prompt_logprobs[:-1] == less.prompt_logprobs
    assert (engine.stats.tokens_out, engine.stats.pages_used) == (before, 0)
    with pytest.raises(RequestError, match=f"context of {length}; at most {length} tokens fit"):
        engine.submit(request("more", (*prompt, 4), **scoring))
    with pytest.raises(RequestError, match="max_tokens=0 must be more than 0"):
        SamplingParams(max_tokens=0)


def test_the_same_prompt_given_twice_is_drawn_twice(engine, tokenizer):
    params = SamplingParams(max_tokens=12, banned_token_ids=(300,), seed=5)
    first, second, third = stream(
        engine, TextTurns(tokenizer), ["The number"] * 3, params, lambda *_, **__: None
    )
    assert len({first, second, third}) == 3
    (alone,) = stream(engine, TextTurns(tokenizer), ["The number"], params, lambda *_, **__: None)
    assert alone == first


def test_each_token_of_a_list_counts_once():
    params = SamplingParams(banned_token_ids=[5, 6] * 100_000, stop_token_ids=(7, 7))
    assert (params.banned_token_ids, params.stop_token_ids) == ((5, 6), (7,))
