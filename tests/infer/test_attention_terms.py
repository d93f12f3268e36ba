"""The engine with a sliding window and a temperature by position: the same tokens as the full
forward pass, in fewer pages."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import grok
from grok.config import EngineConfig
from grok.config.sampling import SamplingParams
from grok.errors import RequestError
from grok.infer.engine import Engine
from grok.infer.request import Request
from grok.model.decoder import Decoder
from tests.fixtures.models import model_config

WINDOW = 13
CONFIG = model_config(
    {
        "vocab_size": 64,
        "num_layers": 2,
        "embed_dim": 16,
        "attention.num_heads": 4,
        "attention.num_kv_heads": 2,
        "attention.head_dim": 4,
        "attention.logit_scale": 2.0,  # attention that matters
        "attention.window": WINDOW,
        "attention.temperature_length": 6,
        "moe.dim": 24,
        "moe.num_experts": 4,
        "context_length": 128,
        "compute_dtype": "float32",
    }
)
# Pages of 4 tokens, two of them computed in a prefill step.
OPTIONS = EngineConfig(max_num_seqs=4, page_size=4, prefill_chunk_size=8)
PAGES = 3 + 2  # of the 12 keys before a token, and of a step's tokens


@functools.cache
def model(on_mesh: bool) -> Decoder:
    return grok.init(CONFIG, jax.random.key(0), mesh(on_mesh))


def mesh(on_mesh: bool):
    if on_mesh:
        return grok.make_mesh(data=2, expert=2, tensor=2)
    return grok.make_mesh(devices=jax.devices()[:1])


def engine(on_mesh: bool = False, **options) -> Engine:
    return Engine(model(on_mesh), None, mesh(on_mesh), dataclasses.replace(OPTIONS, **options))


def requests(count: int) -> list[Request]:
    """Prompts of 1 to 80 tokens that begin alike, and greedy answers of 20."""
    random = np.random.default_rng(1)
    shared = random.integers(1, 64, 60)
    prompts = []
    for i in range(count):
        prompt = [
            *shared[: random.integers(1, 60)],
            *random.integers(1, 64, random.integers(1, 20)),
        ]
        params = SamplingParams(max_tokens=20, temperature=0)
        prompts.append(Request(f"request-{i}", tuple(map(int, prompt)), params))
    return prompts


def answers(engine: Engine, batch: list[Request]) -> tuple[dict[str, tuple[int, ...]], int]:
    """Tokens of every answer, and the most pages that had users at a time."""
    results, most_pages = dict.fromkeys((request.id for request in batch), ()), 0
    for request in batch:
        engine.submit(request)
    while engine.unfinished:
        for output in engine.step():
            results[output.request_id] += output.token_ids
        most_pages = max(most_pages, engine.stats.pages_used)
    return results, most_pages


def assert_greedy(results, batch) -> None:
    """Every token is the likeliest of the full forward pass, by a margin that rounding cannot
    move."""
    rows = np.zeros((len(batch), 128), np.int32)
    for row, request in zip(rows, batch, strict=True):
        tokens = request.prompt + results[request.id]
        row[: len(tokens)] = tokens
    logits_BTV = np.asarray(model(False)(rows))
    for request, logits_TV in zip(batch, logits_BTV, strict=True):
        first = len(request.prompt) - 1
        expected = logits_TV[first : first + 20].argmax(-1).tolist()
        assert list(results[request.id]) == expected


@pytest.mark.parametrize("on_mesh", [False, True], ids=["one device", "2x2x2"])
def test_answers_are_those_of_the_full_forward(on_mesh):
    """Long prompts in several steps, prefixes reused, more requests than slots."""
    batch = requests(4 if on_mesh else 12)
    served = engine(on_mesh, num_pages=80)
    results, _ = answers(served, batch)
    assert_greedy(results, batch)
    assert served.stats.pages_used == 0
    found, longest = served.stats.tokens_cached, max(batch, key=lambda request: len(request.prompt))
    assert answers(served, [longest])[0] == {longest.id: results[longest.id]}
    assert served.stats.tokens_cached - found == (len(longest.prompt) - 1) // 4 * 4


def test_preempted_sequences_get_the_same_tokens():
    """Four short prompts whose answers grow to more pages than there are."""
    params = SamplingParams(max_tokens=20, temperature=0)
    batch = [Request(f"request-{i}", (i, 2, 3), params) for i in range(6)]
    served = engine(num_pages=13)
    results, _ = answers(served, batch)
    assert_greedy(results, batch)
    assert served.stats.preempted > 0


@pytest.mark.prove
def test_an_int8_cache_gives_the_same_tokens_in_few_pages():
    """As each request gets alone with pages for all its tokens: what others left in a page that was
    freed changes nothing."""
    batch = requests(6)
    few, many = (engine(cache_dtype="int8", num_pages=pages) for pages in (2 * PAGES, 200))
    single = {}
    for request in batch:
        single |= answers(many, [request])[0]
    assert answers(few, batch)[0] == single


def test_one_sequence_needs_the_pages_of_its_window_and_a_chunk():
    """Of 25 pages that all its tokens would take."""
    params = SamplingParams(max_tokens=20, temperature=0)
    prompt = tuple(np.random.default_rng(2).integers(1, 64, 80).tolist())
    batch = [Request("a", prompt, params)]
    results, most_pages = answers(engine(num_pages=PAGES), batch)
    assert_greedy(results, batch)
    assert most_pages == PAGES
    with pytest.raises(RequestError, match=r"engine\.num_pages=5 would work"):
        engine(num_pages=PAGES - 1).submit(batch[0])


def test_the_default_cache_holds_what_windows_need():
    stats = engine().stats
    assert stats.pages_free == 4 * PAGES


def test_a_conversation_reuses_its_last_pages():
    """The next turn finds those in its window, though others hold what came before."""
    served, params = engine(num_pages=10), SamplingParams(max_tokens=20, temperature=0)
    first = Request("first", tuple(range(1, 50)), params)
    results, _ = answers(served, [first])
    assert served.stats.pages_cached < 49 // 4
    second = Request("second", first.prompt + results["first"][:9], params)
    results, _ = answers(served, [second])
    assert served.stats.tokens_cached == 48
    assert_greedy(results, [second])
