"""The engine on five families: goldens' greedy tokens, and the log-probabilities of the full
forward, through pages, chunks of prompts, reused prefixes, and an int8 cache."""

import dataclasses

import jax
import numpy as np
import pytest

from grok.config import EngineConfig
from grok.config.sampling import SamplingParams
from grok.errors import RequestError
from grok.infer.engine import Engine
from grok.infer.request import Request
from tests.fixtures.prove import in_suite
from tests.model import families

# Prompts of up to 140 tokens in chunks of 16, on pages of 8.
OPTIONS = EngineConfig(max_num_seqs=4, page_size=8, prefill_chunk_size=16, num_pages=160)
# Run by `make prove`; test_attention_terms.py has a mesh in the suite.
MESHES = [pytest.param(sizes, marks=pytest.mark.prove) for sizes in ((2, 2, 2), (1, 2, 4))]
each_family = pytest.mark.parametrize("family", families.TOLERANCE)


def engine(family: str, sizes: tuple[int, ...] = (1, 1, 1), **options) -> Engine:
    model, mesh = families.model(family, sizes), families.mesh(sizes)
    return Engine(model, None, mesh, dataclasses.replace(OPTIONS, **options))


def answers(engine: Engine, requests: list[Request]) -> dict[str, tuple[tuple, tuple]]:
    """Tokens and their log-probabilities, by request."""
    results = {request.id: ((), ()) for request in requests}
    for output in engine.generate(requests):
        tokens, scores = results[output.request_id]
        added = tuple(item.logprob for item in output.logprobs or ())
        results[output.request_id] = tokens + output.token_ids, scores + added
    return results


def greedy(family: str, name: str = "", count: int = 16) -> list[Request]:
    params = SamplingParams(max_tokens=count, temperature=0.0, logprobs=0)
    prompts = families.prompts(family)
    return [Request(f"{name}{i}", tuple(p.tolist()), params) for i, p in enumerate(prompts)]


@pytest.mark.parametrize("family", in_suite(families.TOLERANCE, "grok2", "mixtral", "mistral"))
@pytest.mark.parametrize("sizes", [(1, 1, 1), *MESHES], ids=str)
def test_greedy_tokens_are_the_goldens_and_prefixes_are_reused(family, sizes):
    here = engine(family, sizes)
    first = answers(here, greedy(family))
    for i in range(len(families.prompts(family))):
        tokens, stored = first[str(i)][0], families.outputs(family)
        # Up to the first token that is nearly tied.
        clear = stored[f"greedy_margin_{i}"] > 10 * families.TOLERANCE[family]
        count = len(clear) if clear.all() else int(clear.argmin())
        assert count > 8
        assert tokens[:count] == tuple(stored[f"greedy_{i}"][:count].tolist())
    again = answers(here, greedy(family, "again"))
    assert {name.removeprefix("again"): answer for name, answer in again.items()} == first
    assert here.stats.tokens_cached > 0
    assert here.stats.pages_used == 0


@each_family
def test_log_probabilities_are_those_of_the_full_forward(family):
    results = answers(engine(family), greedy(family))
    for i, prompt in enumerate(families.prompts(family)):
        tokens, logprobs = results[str(i)]
        text = np.concatenate([prompt, tokens])[None]
        scores = np.asarray(jax.nn.log_softmax(families.model(family)(text)))[0]
        places = np.arange(len(prompt) - 1, len(prompt) - 1 + len(tokens))
        error = np.abs(scores[places, list(tokens)] - logprobs).max()
        assert error < families.TOLERANCE[family] / 2


@pytest.mark.parametrize("family", in_suite(families.TOLERANCE, "grok2"))
def test_an_int8_cache_changes_little_more_than_a_bfloat16_one(family):
    """Both round keys and values, to 7 and to 8 bits. Random weights make much of any rounding, and
    tokens that go to other experts change by a lot: medians."""
    prompts = families.prompts(family)
    right, bfloat16, int8 = (
        np.concatenate([answers_of(family, dtype, prompt) for prompt in prompts])
        for dtype in ("float32", "bfloat16", "int8")
    )
    changes = [float(np.median(np.abs(right - ours))) for ours in (bfloat16, int8)]
    print("\n{}: bfloat16 cache {:.4f}, int8 cache {:.4f} nats".format(family, *changes))
    assert 0 < changes[1] < 4 * changes[0]


def answers_of(family: str, cache_dtype: str, prompt: np.ndarray) -> np.ndarray:
    """Log-probabilities of a prompt's own tokens."""
    here = engine(family, cache_dtype=cache_dtype)
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    request = Request("prompt", tuple(prompt.tolist()), params)
    (scores,) = [o.prompt_logprobs for o in here.generate([request]) if o.prompt_logprobs]
    return np.array([score.logprob for score in scores[1:]])


def test_experts_of_a_model_without_any_are_refused():
    params = SamplingParams(max_tokens=1, experts=True)
    with pytest.raises(RequestError, match=r"no experts; experts=false would work"):
        engine("llama2").submit(Request("a", (5, 6), params))
