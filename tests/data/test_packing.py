"""Layouts of documents in rows: every token in its place, once an epoch, and little padding."""

import threading

import numpy as np
import pytest

from grok.data.packing import (
    PACKERS,
    BestFit,
    ConcatThenSplit,
    DocumentSlice,
    EpochCache,
    best_fit_decreasing,
    packing_efficiency,
    permutation,
    stable_argsort,
)
from tests.data.fake_documents import random_lengths

LENGTHS = np.array(random_lengths(300, largest=200), np.uint32)
ROW = 32


def epoch_of(layout, epoch: int) -> list[list[DocumentSlice]]:
    rows = range(epoch * layout.rows_per_epoch, (epoch + 1) * layout.rows_per_epoch)
    return [layout.slices(row) for row in rows]


def test_a_permutation_is_fixed_for_good():
    assert permutation(8, "key", 0).tolist() == [0, 6, 1, 4, 5, 7, 3, 2]
    np.testing.assert_array_equal(np.sort(permutation(1000, 1)), np.arange(1000))
    assert permutation(1000, 1).tolist() != permutation(1000, 2).tolist()


@pytest.mark.parametrize("epoch", [0, 1, 10**6])
def test_continued_documents_are_whole_once_an_epoch(epoch):
    layout = PACKERS["concat_then_split"](LENGTHS, ROW, "key")
    rows = epoch_of(layout, epoch)
    assert [sum(piece.size for piece in row) for row in rows[:-1]] == [ROW] * (len(rows) - 1)
    reached = dict.fromkeys(range(len(LENGTHS)), 0)
    for piece in (piece for row in rows for piece in row):
        assert piece.start == reached[piece.document]
        reached[piece.document] += piece.size
    assert list(reached.values()) == LENGTHS.tolist()


def test_epochs_have_orders_of_their_own():
    for packing in ("concat_then_split", "best_fit"):
        layout = PACKERS[packing](LENGTHS, ROW, "key")
        assert epoch_of(layout, 0) != epoch_of(layout, 1)
        assert epoch_of(layout, 0) == epoch_of(PACKERS[packing](LENGTHS, ROW, "key"), 0)
        assert epoch_of(layout, 0) != epoch_of(PACKERS[packing](LENGTHS, ROW, "other"), 0)


def test_without_a_key_documents_keep_their_order():
    layout = ConcatThenSplit(np.array([3, 40, 2]), ROW, key=None)
    assert epoch_of(layout, 0) == [
        [DocumentSlice(0, 0, 3), DocumentSlice(1, 0, 29)],
        [(1, 29, 11), (2, 0, 2)],
    ]
    assert epoch_of(layout, 0) == epoch_of(layout, 1)


@pytest.mark.parametrize("epoch", [0, 7])
def test_cut_documents_are_never_split_and_are_there_once_an_epoch(epoch):
    rows = epoch_of(BestFit(LENGTHS, ROW, "key"), epoch)
    assert max(sum(piece.size for piece in row) for row in rows) <= ROW
    pieces = sorted(piece for row in rows for piece in row)
    expected = [(d, 0, min(n - 1, ROW)) for d, n in enumerate(LENGTHS.tolist()) if n > 1]
    assert pieces == expected


def test_documents_of_one_token_predict_nothing():
    assert BestFit(np.ones(5), ROW, "key").rows_per_epoch == 0
    assert epoch_of(BestFit(np.array([1, 3, 1]), ROW, "key"), 0) == [[DocumentSlice(1, 0, 2)]]
    assert ConcatThenSplit(np.ones(5), ROW, "key").rows_per_epoch == 1


@pytest.mark.parametrize("packing", ["concat_then_split", "best_fit"])
def test_tokens_before_a_row_are_those_of_its_pieces(packing):
    layout = PACKERS[packing](LENGTHS, ROW, "key")
    seen = 0
    for row in range(2 * layout.rows_per_epoch + 3):
        assert layout.tokens_before(row) == seen
        seen += sum(piece.size for piece in layout.slices(row))


@pytest.mark.parametrize("packing", ["concat_then_split", "best_fit"])
def test_rows_are_98_percent_full(packing):
    lengths = np.array(random_lengths(20_000, largest=10_000))
    assert packing_efficiency(PACKERS[packing](lengths, 2048, "key"), 2048) > 0.98


@pytest.mark.parametrize(
    ("sizes", "num_rows"),
    [
        ([], 0),
        ([0, 0], 0),
        ([10], 1),
        ([10, 10, 10], 3),
        ([6, 4, 6, 4, 0], 2),
        ([3] * 7, 3),
        ([1] * 25, 3),
        ([7, 5, 5, 3], 2),
        ([6, 5, 5, 2, 2], 2),
    ],
)
def test_pack_fills_rows(sizes, num_rows):
    sizes_N = np.array(sizes, np.int64)
    row_N = best_fit_decreasing(sizes_N, 10)
    np.testing.assert_array_equal(row_N == -1, sizes_N == 0)
    full_R = np.bincount(row_N[row_N >= 0], sizes_N[row_N >= 0], minlength=num_rows)
    assert len(full_R) == num_rows
    assert (full_R <= 10).all() and (full_R > 0).all()


def test_the_order_of_the_next_epoch_is_made_in_the_background():
    made, going = [], threading.Event()

    def order(epoch: int) -> int:
        assert epoch == 0 or going.wait(60)
        made.append(epoch)
        return 10 * epoch

    orders = EpochCache(order)
    assert [orders.get(0, share) for share in (0, 0.4, 0.5, 0.9)] == [0] * 4
    assert made == [0]  # the next has been begun, and nothing waited for it
    going.set()
    assert orders.get(1, 0) == 10
    assert orders.get(0, 0.9) == 0
    assert made == [0, 1]


def test_orders_of_far_epochs_are_dropped_and_made_again():
    made = []
    orders = EpochCache(made.append)
    for epoch in (0, 1, 2, 7, 2, 0):
        orders.get(epoch, 0)
    assert made == [0, 1, 2, 7, 0]


@pytest.mark.parametrize("values", [[], [0], [3, 0, 3, 1, 0, 2**40, 1]])
def test_sorted_places_are_those_of_a_stable_argsort(values):
    values_N = np.array(values, np.int64)
    expected = np.argsort(values_N, kind="stable")
    np.testing.assert_array_equal(stable_argsort(values_N), expected)
