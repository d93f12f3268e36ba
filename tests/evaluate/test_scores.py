"""Log-probabilities of continuations: the model's own, whatever they are batched with.

Letters: B rows, T tokens, V vocab.
"""

import jax
import numpy as np
import pytest

import grok
from grok.config import AttentionConfig, ModelConfig, MoEConfig
from grok.evaluate.scores import Scorer
from grok.weights.load import put_on_mesh
from tests.fixtures.random_weights import RandomSource

CONFIG = ModelConfig(
    vocab_size=64,
    num_layers=2,
    embed_dim=16,
    moe=MoEConfig(dim=24, num_experts=4),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4),
    context_length=32,
    compute_dtype="float32",
    remat="none",
)
SOURCE = RandomSource(CONFIG, dtype="float32")
# Tokens of contexts and continuations: several buckets, more than a batch, one too long.
LENGTHS = [(1, 1), (3, 5), (10, 8), (1, 32), (16, 17), (30, 10), (4, 0), *[(5, 2)] * 10]


def pairs() -> list[tuple[list[int], list[int]]]:
    random = np.random.default_rng(0)
    return [tuple(random.integers(1, 64, n).tolist() for n in each) for each in LENGTHS]


@pytest.fixture(scope="module")
def expected() -> list[tuple[float, bool]]:
    """The same from plain logits, a pair at a time."""
    model = put_on_mesh(SOURCE)
    scores = []
    for context, continuation in pairs():
        tokens = np.array([*context, *continuation])[-33:]
        row = np.pad(tokens[:-1], (0, 33 - len(tokens)))[None]
        log_p_TV = np.asarray(jax.nn.log_softmax(model(row)), np.float64)[0]
        first = len(tokens) - 1 - len(continuation)
        places = range(max(0, first), len(tokens) - 1)
        each = [(log_p_TV[t, tokens[t + 1]], log_p_TV[t].max()) for t in places]
        scores.append((sum(p for p, _ in each), all(p == best for p, best in each)))
    return scores


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)], ids=str)
def test_scores_are_those_of_the_logits(expected, sizes):
    mesh = grok.make_mesh(*sizes) if sizes else grok.make_mesh(1, devices=jax.devices()[:1])
    scores = Scorer(put_on_mesh(SOURCE, mesh), mesh, rows=8).score(pairs())
    assert [score.is_greedy for score in scores] == [greedy for _, greedy in expected]
    for score, (log_p, _) in zip(scores, expected, strict=True):
        assert score.log_probability == pytest.approx(log_p, rel=1e-5, abs=1e-5)


def test_the_likeliest_continuation_is_greedy():
    model = put_on_mesh(SOURCE)
    mesh = grok.make_mesh(1, devices=jax.devices()[:1])
    row = np.zeros((1, 32), np.int64)
    row[0, :3] = 7, 8, 9
    best = int(np.argmax(model(row)[0, 2]))
    scorer = Scorer(put_on_mesh(SOURCE, mesh), mesh, rows=8)
    right, wrong = scorer.score([([7, 8, 9], [best]), ([7, 8, 9], [(best + 1) % 64])])
    assert right.is_greedy and not wrong.is_greedy
    assert right.log_probability > wrong.log_probability
