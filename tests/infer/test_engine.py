"""The engine as its caller sees it: the same tokens whatever runs beside, and pages given back."""

import dataclasses

import jax
import numpy as np
import pytest

import grok
from grok.config import EngineConfig
from grok.config.sampling import SamplingParams
from grok.data.tokenizers import load_tokenizer
from grok.errors import RequestError
from grok.infer.engine import Engine
from grok.infer.request import Request
from grok.model.flat import modules_of

OPTIONS = EngineConfig(max_num_seqs=8, page_size=16, prefill_chunk_size=32, num_pages=32)
FEW = SamplingParams(max_tokens=3)
SHARED = tuple(range(10, 50))
KINDS = [
    {"temperature": 0.0},
    {},
    {"top_k": 5, "n": 2},
    {"top_p": 0.7, "min_p": 0.1, "temperature": 1.5},
    {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.2,
        "logit_bias": {token: (-1) ** token * 3.5 for token in range(20, 320)},
    },
    {"allowed_token_ids": (5, 6, 7, 8), "prompt_logprobs": 1},
    {"min_tokens": 3, "stop_token_ids": tuple(range(4, 160)), "logprobs": 2},
]


def requests(count: int, top: int = 40) -> list[Request]:
    """Prompts and answers of mixed lengths; each third prompt begins alike."""
    random, prompts = np.random.default_rng(0), []
    for i in range(count):
        prompt = tuple(random.integers(4, 320, random.integers(1, 50)).tolist())
        if i % 3 == 0:
            prompt = SHARED + prompt[:10]
        params = SamplingParams(
            max_tokens=int(random.integers(4, top)), seed=i, **KINDS[i % len(KINDS)]
        )
        prompts.append(Request(f"request-{i}", prompt, params))
    return prompts


def answers(engine: Engine, batch: list[Request]) -> dict[tuple[str, int], tuple]:
    """Tokens, log-probabilities and end of every answer."""
    results: dict[tuple[str, int], list] = {}
    for output in engine.generate(batch):
        result = results.setdefault((output.request_id, output.choice), [(), (), None, None])
        result[0] += output.token_ids
        result[1] += output.logprobs or ()
        result[2] = output.prompt_logprobs or result[2]
        result[3] = output.finish_reason
    return {key: tuple(result) for key, result in results.items()}


@pytest.fixture(scope="module", params=["one device", "2x2x2"])
def engine(tiny_run, request):
    if request.param == "2x2x2":
        mesh = grok.make_mesh(data=2, expert=2, tensor=2)
    else:
        mesh = grok.make_mesh(devices=jax.devices()[:1])
    return Engine(grok.init(tiny_run.model, jax.random.key(3), mesh), None, mesh, OPTIONS)


@pytest.fixture(scope="module")
def batch(engine) -> list[Request]:
    """Every kind thrice on one device, and once on a mesh, where a step takes far longer."""
    return requests(21 if engine._mesh.size == 1 else 7)


@pytest.fixture(scope="module")
def single(engine, batch):
    """What each request gets when nothing else runs."""
    results = {}
    for request in batch:
        results |= answers(engine, [request])
    return results


def test_many_at_once_get_the_tokens_that_each_gets_alone(engine, batch, single):
    """Half of the pages that 8 slots could fill, so that some are preempted as well."""
    assert answers(engine, batch) == single
    stats = engine.stats
    assert stats.pages_used == 0
    assert (stats.running, stats.waiting, engine.unfinished) == (0, 0, 0)
    assert stats.pages_cached + stats.pages_free == 32
    assert stats.tokens_cached > 0


def test_greedy_tokens_are_those_of_the_full_forward(engine, batch, single):
    for request in batch:
        if request.params.temperature:
            continue
        tokens = single[request.id, 0][0]
        # One forward pass over prompt and answer scores every place at once.
        rows = np.zeros((4, 128), np.int32)
        rows[0, : len(request.prompt) + len(tokens)] = request.prompt + tokens
        scores = np.asarray(modules_of(engine._model)(rows))[0]
        first = len(request.prompt) - 1
        assert tokens == tuple(scores[first : first + len(tokens)].argmax(-1).tolist())


def test_log_probabilities_are_those_of_the_full_forward(engine):
    params = SamplingParams(max_tokens=5, logprobs=3, prompt_logprobs=2, temperature=0.5)
    prompt = tuple(range(30, 70))
    ((tokens, logprobs, before, reason),) = answers(engine, [Request("a", prompt, params)]).values()
    assert (len(tokens), reason) == (5, "length")
    rows = np.zeros((4, 128), np.int32)
    rows[0, :45] = prompt + tokens
    scores = np.asarray(jax.nn.log_softmax(np.asarray(modules_of(engine._model)(rows))[0]))
    assert before[0] is None
    for position, reported in enumerate((*before[1:], *logprobs)):
        assert reported.token == rows[0, position + 1]
        np.testing.assert_allclose(reported.logprob, scores[position, reported.token], atol=1e-4)
        likeliest = np.argsort(-scores[position], kind="stable")[: len(reported.top)]
        assert [token for token, _ in reported.top] == likeliest.tolist()
        np.testing.assert_allclose(
            [value for _, value in reported.top], scores[position][likeliest], atol=1e-4
        )
        assert len(reported.top) == (2 if position < 39 else 3)


def test_biases_are_added_to_logits(engine):
    def greedy(biases: dict | None, **params) -> tuple:
        params = {"temperature": 0, "logit_bias": biases, "logprobs": 2} | params
        request = Request("a", SHARED, SamplingParams(max_tokens=1, **params))
        return next(iter(answers(engine, [request]).values()))

    (first,), (scores,), *_ = greedy(None)
    (_, best), (second, less) = scores.top
    gap = best - less
    assert greedy({second: gap + 1e-3})[0] == (second,)
    assert greedy({second: gap - 1e-3})[0] == (first,)
    # Log-probabilities are the model's own, whatever is added.
    assert greedy({second: gap + 1e-3})[1][0].top == scores.top
    assert greedy({str(first): -gap - 1e-3})[0] == (second,)
    # The least bias bans, whatever the temperature; and a request after it has none.
    hot = greedy(dict.fromkeys(range(300), -100), temperature=1e30)
    assert hot[0][0] >= 300
    assert greedy(None)[0] == (first,)


def test_experts_of_an_answer_are_those_of_the_full_forward(engine):
    prompt = tuple(range(30, 70))
    params = SamplingParams(max_tokens=9, experts=True, temperature=0)
    outputs = list(engine.generate([Request("a", prompt, params)]))
    tokens = prompt + sum((output.token_ids for output in outputs), ())
    experts_TLC = np.asarray(sum((output.experts for output in outputs), ()))
    assert experts_TLC.shape == (8, 2, 2)  # the last token was not run
    counts = []
    for length in (len(prompt), len(tokens) - 1):
        rows, real = np.zeros((2, 4, 128), np.int32)
        rows[0, :length], real[0, :length] = tokens[:length], 1
        _, stats = jax.jit(grok.Grok.hidden)(modules_of(engine._model), rows, real)
        load_LE = np.asarray(stats.load_E)
        counts.append(np.rint(load_LE * length * 2).astype(int))
    for layer in range(2):
        counted = np.bincount(experts_TLC[:, layer].ravel(), minlength=8)
        assert counted.tolist() == (counts[1] - counts[0])[layer].tolist()


def test_few_pages_give_the_same_tokens(engine, batch, single):
    preempted = engine.stats.preempted
    pools = engine._scheduler.pools
    held = [[pool.allocate() for _ in range(32 // len(pools) - 8)] for pool in pools]
    assert answers(engine, batch) == single
    assert len(pools) > 1 or engine.stats.preempted > preempted
    for pool, pages in zip(pools, held, strict=True):
        pool.release(pages)


def test_a_cancelled_request_gives_its_pages_back(engine, batch, single):
    first, *others = batch[:6]
    engine.submit(first)
    for request in others:
        engine.submit(request)
    engine.step()
    engine.cancel(first.id)
    engine.cancel("unknown")
    outputs = []
    while engine.unfinished:
        outputs += engine.step()
    ends = {output.request_id: output.finish_reason for output in outputs if output.finish_reason}
    assert ends[first.id] == "cancelled"
    assert engine.stats.pages_used == 0
    for request in others:
        tokens = sum(
            (o.token_ids for o in outputs if (o.request_id, o.choice) == (request.id, 0)), ()
        )
        expected = single[request.id, 0][0]
        assert tokens == expected[len(expected) - len(tokens) :]


def test_the_best_of_several_is_told(engine):
    params = SamplingParams(max_tokens=4, n=4, logprobs=0, seed=5)
    every = answers(engine, [Request("a", (5, 6, 7), params)])
    best = answers(engine, [Request("a", (5, 6, 7), dataclasses.replace(params, n=2, best_of=4))])

    def mean(answer):
        return np.mean([token.logprob for token in answer[1]])

    ranked = sorted(every.values(), key=mean, reverse=True)
    assert [best["a", choice] for choice in (0, 1)] == ranked[:2]


def test_stop_texts_are_cut_and_never_shown_in_part(tiny_run, engine):
    tokenizer = load_tokenizer(tiny_run.data.tokenizer)
    spoken = Engine(engine._model, tokenizer, engine._mesh, OPTIONS)
    params = SamplingParams(max_tokens=30, seed=2, ignore_eos=True)
    prompt = tuple(tokenizer.encode("The number 12"))
    text_without_stop = "".join(o.text for o in spoken.generate([Request("a", prompt, params)]))
    stop = text_without_stop[10:14]
    cut = dataclasses.replace(params, stop=("never here", stop))
    outputs = list(spoken.generate([Request("a", prompt, cut)]))
    text = "".join(output.text for output in outputs)
    assert text == text_without_stop[: text_without_stop.index(stop)]
    assert outputs[-1].finish_reason == "stop"


def test_one_refused_request_of_several_leaves_none_in_flight(engine):
    good, long = (Request(name, (5,) * n, FEW) for name, n in (("good", 2), ("long", 200)))
    for others in ([long], [good]):
        with pytest.raises(RequestError):
            list(engine.generate([good, *others]))
        assert engine.unfinished == 0


def test_requests_that_are_left_early_end(engine):
    outputs = engine.generate([Request("left", (5, 6), FEW)])
    next(outputs)
    outputs.close()
    assert (engine.unfinished, engine.stats.pages_used) == (0, 0)


def test_tokens_of_a_prompt_are_counted_when_it_is_read(engine):
    before = engine.stats.tokens_in
    engine.submit(Request("a", (5, 6, 7), dataclasses.replace(FEW, n=2)))
    assert engine.stats.tokens_in == before
    while engine.unfinished:
        engine.step()
    assert engine.stats.tokens_in == before + 3


def test_a_step_writes_into_the_cache_that_it_was_given(engine):
    def pointers() -> list[int]:
        shards = engine._cache.kv.addressable_shards
        return [shard.data.unsafe_buffer_pointer() for shard in shards]

    before = pointers()
    answers(engine, [Request("a", (5, 6, 7), FEW)])
    assert pointers() == before


@pytest.mark.parametrize(
    ("prompt", "params", "parameter", "words"),
    [
        ((), {}, "prompt", "the prompt is empty"),
        ((320,), {}, "prompt", "token 320 and the model's vocabulary 320"),
        ((1,) * 125, {"max_tokens": 8}, "max_tokens", "at most 3 new tokens"),
        ((1,) * 128, {}, "prompt", "at most 127 tokens fit"),
        ((1,), {"stop": ("x",)}, "stop", "need a tokenizer"),
        ((1,), {"allowed_token_ids": (5,), "banned_token_ids": (5,)}, "allowed_token_ids", "leav"),
        ((1,), {"banned_token_ids": tuple(range(320))}, "banned_token_ids", "leaves no token"),
        ((1,), {"logit_bias": {320: 1}}, "logit_bias", "token 320 and the model's vocabulary 320"),
        ((1,), {"allowed_token_ids": (5,), "logit_bias": {5: -100}}, "allowed_token_ids", "leav"),
    ],
)
def test_requests_that_cannot_work_are_refused(engine, prompt, params, parameter, words):
    with pytest.raises(RequestError, match=words) as caught:
        engine.submit(Request("a", prompt, SamplingParams(**{"max_tokens": 4} | params)))
    assert caught.value.parameter == parameter
    assert engine.unfinished == 0


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_p", 1.5),
        ("stop", "text"),
        ("stop", ("",)),
        ("n", True),
        ("logprobs", 21),
        ("seed", -1),
        ("min_tokens", 500),
        ("logit_bias", [5]),
        ("logit_bias", {5: 101}),
        ("logit_bias", {5: float("nan")}),
        ("logit_bias", {5: "1"}),
        ("logit_bias", {5: True}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", {"05": 1}),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {5: 1, "5": 2}),
        ("logit_bias", dict.fromkeys(range(301), 1)),
    ],
)
def test_parameters_that_cannot_be_are_refused(parameter, value):
    with pytest.raises(RequestError, match=parameter) as caught:
        SamplingParams(**{parameter: value})
    assert caught.value.parameter == parameter
