"""Baselines: against hand-written sums, and that they are distributions that never fail."""

import gzip
import math

import numpy as np
import pytest

from grok.data.stream_batches import TokenStream
from grok.quickstart import baselines

V, EOS = 12, 2


def stream(tokens, num_bytes: int = 100) -> TokenStream:
    return TokenStream(tokens_S=np.array(tokens, np.int32), num_bytes=num_bytes, eos_id=EOS)


@pytest.fixture
def train() -> TokenStream:
    draw = np.random.default_rng(0)
    tokens = draw.choice(np.arange(3, V - 1), 400, p=np.arange(1, V - 3) / 36)
    return stream([*tokens, EOS])


@pytest.mark.parametrize("context", [EOS, 5, V - 1])
@pytest.mark.parametrize("discount", [0.05, 0.75])
def test_bigram_probabilities_sum_to_one(train, context, discount):
    """After eos, a frequent token, and a token that training never had."""
    nats = [
        baselines._bigram_nats(train.tokens_S, np.array([context, w]), V, EOS, discount)
        - baselines._bigram_nats(train.tokens_S, np.array([context]), V, EOS, discount)
        for w in range(V)
    ]
    assert np.exp(-np.array(nats)).sum() == pytest.approx(1)


def test_bigram_by_hand():
    """Train: eos a b a b a. Pairs: (eos,a) 1, (a,b) 2, (b,a) 2; P(a)=(2-d)/3 + 2d/3V."""
    a, b, d = 3, 4, 0.5
    lower_a = (2 - d) / 3 + 2 * d / 3 / V
    lower_b = (1 - d) / 3 + 2 * d / 3 / V
    p_a_after_eos = (1 - d) / 1 + d * 1 / 1 * lower_a
    p_b_after_a = (2 - d) / 2 + d * 1 / 2 * lower_b
    nats = baselines._bigram_nats(np.array([a, b, a, b, a]), np.array([a, b]), V, EOS, d)
    assert nats == pytest.approx(-math.log(p_a_after_eos) - math.log(p_b_after_a))


def test_unigram_by_hand():
    nats = baselines._unigram_nats(np.array([3, 3, 4]), np.array([3, 5]), V, added=1.0)
    assert nats == pytest.approx(-math.log(3 / (3 + V)) - math.log(1 / (3 + V)))


def test_unigram_of_uniform_tokens_is_their_entropy():
    tokens = np.random.default_rng(0).integers(0, 8, 200_000)
    bits = baselines.unigram_bits_per_byte(stream(tokens), stream(tokens[:1000], 1000), 8)
    assert bits == pytest.approx(3, abs=0.01)


def test_bigram_learns_a_cycle_that_the_unigram_cannot():
    cycle = stream(list(range(3, 11)) * 200)
    heldout = stream(list(range(3, 11)) * 5, num_bytes=40)
    assert baselines.unigram_bits_per_byte(cycle, heldout, V) == pytest.approx(3, abs=0.1)
    assert baselines.bigram_bits_per_byte(cycle, heldout, V) < 0.3


def test_tokens_that_training_never_had_cost_a_finite_number(train):
    heldout = stream([0, 1, V - 1, 0, EOS], num_bytes=5)
    assert math.isfinite(baselines.unigram_bits_per_byte(train, heldout, V))
    assert math.isfinite(baselines.bigram_bits_per_byte(train, heldout, V))


def test_constants_are_chosen_without_the_heldout_text(train, monkeypatch):
    asked = []
    original = baselines._bigram_nats

    def record(train_S, heldout_S, *others):
        asked.append((len(train_S), len(heldout_S)))
        return original(train_S, heldout_S, *others)

    monkeypatch.setattr(baselines, "_bigram_nats", record)
    baselines.bigram_bits_per_byte(train, stream([3, 4, 5]), V)
    assert asked == [(361, 40)] * len(baselines.DISCOUNTS) + [(401, 3)]


def test_gzip_counts_the_compressed_bytes():
    text = b"to be or not to be, " * 50
    bits = baselines.gzip_bits_per_byte(text)
    assert bits == 8 * len(gzip.compress(text, 9)) / len(text) < 1
