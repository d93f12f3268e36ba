"""Mixtures: exact shares at every row, in closed form, across changes of the weights."""

from collections import Counter

import pytest

from grok.data.mixture import Mixture


@pytest.mark.parametrize(
    "weights",
    [(0.5, 0.3, 0.2), (5, 3, 2), (1,), (1, 0), (0, 2, 0, 1), (1e-3, 1, 7.25), (0.1,) * 10],
)
def test_every_row_has_one_dataset_and_shares_are_exact(weights):
    mixture = Mixture(weights)
    counts = [0] * len(weights)
    for row in range(2000):
        assert mixture.counts(row) == counts
        dataset, number = mixture.locate(row)
        assert number == counts[dataset]
        counts[dataset] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - (row + 1) * weight / sum(weights)) < len(weights)


def test_shares_of_ten_thousand_rows():
    seen = Counter(Mixture((0.5, 0.3, 0.2)).locate(row)[0] for row in range(10_000))
    assert seen == {0: 5000, 1: 3000, 2: 2000}


def test_far_rows_take_no_longer_and_stay_exact():
    mixture = Mixture((0.5, 0.3, 0.2))
    assert mixture.counts(10**15) == [5 * 10**14, 3 * 10**14, 2 * 10**14]
    assert mixture.locate(10**15 + 3)[1] == mixture.counts(10**15 + 3)[mixture.locate(3)[0]]


def test_weights_change_at_a_row_and_counts_go_on():
    mixture = Mixture((1, 1, 0), [(101, (0, 1, 3)), (301, (1, 0, 0))])
    assert mixture.counts(101) == Mixture((1, 1, 0)).counts(101)
    rows = [mixture.locate(row) for row in range(400)]
    for dataset in range(3):
        numbers = [number for each, number in rows if each == dataset]
        assert numbers == list(range(len(numbers)))
    assert Counter(each for each, _ in rows[101:301]) == {1: 50, 2: 150}
    assert {each for each, _ in rows[301:]} == {0}
