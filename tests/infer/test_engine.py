"""Generation as its caller sees it."""

import dataclasses

import jax
import numpy as np
import pytest

import grok
from grok.errors import DataError
from grok.infer.engine import Engine, SamplingOptions

PROMPTS = [[5, 9, 200, 31], [17], list(range(40, 61))]
GREEDY = SamplingOptions(max_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def mesh():
    return grok.make_mesh(data=2, expert=2, tensor=2)


@pytest.fixture(scope="module")
def model(tiny_run, mesh):
    return grok.init(tiny_run.model, jax.random.key(3), mesh)


@pytest.fixture(scope="module")
def engine(model, mesh):
    return Engine(model, mesh)


def columns(places: list[list[int | None]]) -> list[list[int | None]]:
    return [list(row) for row in zip(*places, strict=True)]


def test_greedy_tokens_are_those_of_the_full_forward(engine, model):
    generated = columns(list(engine.generate(PROMPTS, GREEDY)))
    for prompt, tokens in zip(PROMPTS, generated, strict=True):
        assert len(tokens) == 8
        # One forward pass over prompt and answer scores every place at once.
        row = np.zeros((4, 32), np.int32)
        row[0, : len(prompt) + 8] = prompt + tokens
        scores = np.asarray(model(row))[0]
        likeliest = scores[len(prompt) - 1 : len(prompt) + 7].argmax(-1)
        assert tokens == likeliest.tolist()


def test_a_prompts_tokens_do_not_depend_on_the_others(engine):
    together = columns(list(engine.generate(PROMPTS, GREEDY)))
    alone = columns(list(engine.generate(PROMPTS[:1], GREEDY)))
    assert together[0] == alone[0]


def test_the_seed_decides_the_draw(engine):
    hot = SamplingOptions(max_tokens=8, temperature=1.0, top_p=1.0, seed=1)
    first = list(engine.generate(PROMPTS, hot))
    assert first == list(engine.generate(PROMPTS, hot))
    assert first != list(engine.generate(PROMPTS, dataclasses.replace(hot, seed=2)))


def test_a_row_ends_at_eos_and_the_others_go_on(engine):
    free = columns(list(engine.generate(PROMPTS, GREEDY)))
    eos = free[0][3]
    stopped = columns(list(engine.generate(PROMPTS, GREEDY, eos_id=eos)))
    for tokens, uncut in zip(stopped, free, strict=True):
        end = uncut.index(eos) if eos in uncut else len(uncut)
        assert [token for token in tokens if token is not None] == uncut[:end]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "the prompt is empty"),
        ([320], r"token 320 and the model's vocabulary 320"),
        ([1] * 125, r"125 tokens with 8 new ones .* context of 128; at most 3 new tokens"),
    ],
)
def test_prompts_that_cannot_work_are_refused(engine, prompt, words):
    with pytest.raises(DataError, match=words):
        next(engine.generate([prompt], GREEDY))
