"""Batches whose shape changes on the way: the same tokens in the same order, cut elsewhere.

Mixtures: exact shares at every row, in closed form, across changes of the weights.
"""

import itertools
from collections import Counter

import numpy as np
import pytest

from grok.data.batch_schedule import BatchSchedule, Mixture
from grok.data.packed_batches import PackedBatches
from grok.data.stream_batches import StreamBatches
from tests.data.fake_documents import FakeDocuments, random_lengths
from tests.data.test_device_feed import stream_of

LONGEST, ROWS = 32, 4
CHANGES = [(3, 8, 16), (5, 8, 8), (9, 16, 8), (12, 2, 32), (13, 4, 16)]
STEPS = range(17)
DATASETS = {
    "a": FakeDocuments(random_lengths(90, largest=100)),
    "b": FakeDocuments(random_lengths(90, largest=20), first_token=10_000),
}


def packed(changes=(), packing="concat_then_split") -> PackedBatches:
    mixture = Mixture((0.6, 0.4), [(38, (0.2, 0.8))])
    shapes = BatchSchedule(LONGEST, ROWS, changes)
    return PackedBatches(DATASETS, mixture, shapes, seed=0, packing=packing)


def cut(changes=()) -> PackedBatches:
    return packed(changes, "best_fit")


def plain(changes=()) -> StreamBatches:
    return StreamBatches(stream_of(1000), BatchSchedule(LONGEST, ROWS, changes), seed=0)


def in_a_row(batches, steps, name: str) -> np.ndarray:
    return np.concatenate([batches.batch(step)[name].ravel() for step in steps])


def test_shapes_by_step_and_the_rows_they_take():
    shapes = BatchSchedule(LONGEST, ROWS, CHANGES)
    steps = [0, 2, 3, 4, 5, 8, 9, 12, 13, 10**9]
    expected = [(4, 32), (8, 16), (8, 8), (16, 8), (2, 32), (4, 16)]
    assert [key for key, _ in itertools.groupby(shapes.shape(step) for step in steps)] == expected
    taken = np.diff([shapes.first_row(step) for step in range(15)]).tolist()
    assert taken == [4] * 5 + [2] * 4 + [4] * 3 + [2] * 2
    assert BatchSchedule(LONGEST, ROWS, [(0, 8, 8)]).shape(0) == (8, 8)


@pytest.mark.parametrize("make", [packed, cut, plain])
def test_tokens_targets_and_losses_go_on_as_if_no_shape_had_changed(make):
    changed, steady = make(CHANGES), make()
    for step in STEPS:
        assert {a.shape for a in changed.batch(step).values()} == {changed.shape(step)}
    for name in ("tokens_BT", "targets_BT", "mask_BT"):
        actual = in_a_row(changed, STEPS, name)
        expected = in_a_row(steady, range(len(actual) // (LONGEST * ROWS) + 1), name)
        np.testing.assert_array_equal(actual, expected[: len(actual)])


@pytest.mark.parametrize("make", [packed, cut])
def test_every_cut_row_numbers_its_segments_and_positions_itself(make):
    batches = make(CHANGES)
    firsts = {int(documents.tokens(n)[0]) for documents in DATASETS.values() for n in range(90)}
    for step in STEPS:
        batch = batches.batch(step)
        for tokens, segments, positions in zip(
            batch["tokens_BT"], batch["segment_ids_BT"], batch["positions_BT"], strict=True
        ):
            size = int((segments > 0).sum())
            begins = [n == 0 or token in firsts for n, token in enumerate(tokens[:size].tolist())]
            np.testing.assert_array_equal(segments[:size], np.cumsum(begins))
            starts = np.flatnonzero(begins)[segments[:size] - 1]
            np.testing.assert_array_equal(positions[:size], np.arange(size) - starts)
            for array in (tokens, segments, positions):
                assert not array[size:].any()


@pytest.mark.parametrize("make", [packed, plain])
def test_a_host_gets_its_rows_of_any_shape(make):
    batches = make(CHANGES)
    for step in (0, 3, 5, 9, 12):
        full = batches.batch(step)
        size = batches.shape(step)[0]
        for rows in (slice(0, 1), slice(1, size), slice(size // 2, size // 2 + 1)):
            for name, array in batches.batch(step, rows).items():
                np.testing.assert_array_equal(array, full[name][rows])


@pytest.mark.parametrize("make", [packed, cut])
def test_tokens_seen_are_exact_through_changes(make):
    batches, seen = make(CHANGES), {"a": 0, "b": 0}
    for step in STEPS:
        assert batches.tokens_seen(step) == seen
        batch = batches.batch(step)
        from_b, real = batch["tokens_BT"] >= 10_000, batch["segment_ids_BT"] > 0
        seen["b"] += int(from_b.sum())
        seen["a"] += int((real & ~from_b).sum())
    text = plain(CHANGES)
    assert text.tokens_seen(17) == {"text": in_a_row(text, STEPS, "tokens_BT").size}


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
