"""Packed batches: what each row says to the model, and that all of it follows from the step."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grok
from grok import sharding
from grok.data.batch_schedule import BatchSchedule, Mixture
from grok.data.dataset import TokenDataset
from grok.data.device_feed import global_batches
from grok.data.packed_batches import PackedBatches, PackedValidation
from grok.errors import DataError
from tests.data.fake_documents import FakeDocuments, random_lengths, write_prepared
from tests.fixtures.network import free_port

ROW, ROWS = 32, 8
SHAPE = (ROWS, ROW)


def packed(*datasets, weights=None, changes=(), packing="concat_then_split", seed=0, shapes=()):
    return PackedBatches(
        {f"data/{number}": documents for number, documents in enumerate(datasets)},
        Mixture(weights or [1] * len(datasets), changes),
        BatchSchedule(ROW, ROWS, shapes),
        seed=seed,
        packing=packing,
    )


def predictions(batches) -> Counter:
    """How often each (token, next token) is predicted in batches."""
    counts: Counter = Counter()
    for batch in batches:
        on = batch["mask_BT"] == 1
        counts.update(
            zip(batch["tokens_BT"][on].tolist(), batch["targets_BT"][on].tolist(), strict=True)
        )
    return counts


def pairs_of(documents: FakeDocuments, longest: int | None = None) -> Counter:
    """All neighbours in documents, of each only the first `longest`."""
    return Counter(
        pair
        for index in range(len(documents.lengths))
        for pair in list(
            zip(
                documents.tokens(index).tolist(), documents.tokens(index)[1:].tolist(), strict=False
            )
        )[:longest]
    )


@pytest.fixture(scope="module")
def documents() -> FakeDocuments:
    return FakeDocuments(random_lengths(100, largest=150))


def test_every_token_but_a_documents_first_is_predicted_once_an_epoch(documents):
    rows = -(-int(documents.lengths.sum()) // ROW)
    batches = packed(documents)
    single_rows = [
        batches.batch(row // ROWS, slice(row % ROWS, row % ROWS + 1)) for row in range(2 * rows)
    ]
    assert predictions(single_rows[:rows]) == pairs_of(documents)
    assert predictions(single_rows[rows:]) == pairs_of(documents)


def test_cut_documents_lose_their_ends_and_nothing_else(documents):
    batches = packed(documents, packing="best_fit")
    expected = pairs_of(documents, longest=ROW)
    counts = Counter()
    for step in range(1000):
        counts += predictions([batches.batch(step)])
        if counts.total() >= 3 * expected.total():
            break
    # Whole epochs but for the rest of the last batch.
    assert set(counts) == set(expected)
    assert all(3 <= count <= 4 for count in counts.values())


@pytest.mark.parametrize("packing", ["concat_then_split", "best_fit"])
def test_segments_positions_and_padding(documents, packing):
    for step in range(30):
        batch = packed(documents, packing=packing).batch(step)
        assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
            "tokens_BT": (SHAPE, "int32"),
            "targets_BT": (SHAPE, "int32"),
            "segment_ids_BT": (SHAPE, "int32"),
            "positions_BT": (SHAPE, "int32"),
            "mask_BT": (SHAPE, "float32"),
        }
        for tokens, targets, segments, positions, mask in zip(*batch.values(), strict=True):
            size = int((segments > 0).sum())
            assert set(segments[:size]) == set(range(1, segments.max() + 1))
            assert (np.diff(segments[:size]) >= 0).all()
            for array in (tokens, targets, segments, positions, mask):
                assert not array[size:].any()
            for segment in range(1, segments.max() + 1):
                on = segments == segment
                np.testing.assert_array_equal(positions[on], np.arange(on.sum()))
                np.testing.assert_array_equal(np.diff(tokens[on]), 1)
                assert mask[on][:-1].all()
            np.testing.assert_array_equal(targets[mask == 1], tokens[mask == 1] + 1)


def test_a_mask_says_which_tokens_bear_loss():
    masks = [[0, 0, 0, 1, 1], [0, 1, 0, 1]]
    batch = packed(FakeDocuments([5, 4], masks=masks)).batch(0)
    assert set(batch["targets_BT"][batch["mask_BT"] == 1].tolist()) == {4, 5, 7, 9}


def test_rows_of_a_batch_are_those_of_the_whole_batch(documents):
    batches = packed(documents, FakeDocuments([40] * 9, 10_000), weights=(2, 1))
    full = batches.batch(5)
    for rows in (slice(0, 3), slice(3, 8), slice(7, 8)):
        for name, array in batches.batch(5, rows).items():
            np.testing.assert_array_equal(array, full[name][rows])


def test_shares_changes_and_tokens_seen(documents):
    others = FakeDocuments(random_lengths(70, largest=60), 10_000)
    batches = packed(documents, others, weights=(0.7, 0.3), changes=[(10 * ROWS, (0, 1))])
    seen = {"data/0": 0, "data/1": 0}
    for step in range(20):
        assert batches.tokens_seen(step) == seen
        batch = batches.batch(step)
        from_others = batch["tokens_BT"] >= 10_000
        seen["data/1"] += int(from_others.sum())
        seen["data/0"] += int((batch["segment_ids_BT"] > 0).sum() - from_others.sum())
        rows = int(from_others[:, 0].sum())
        assert rows == ROWS if step >= 10 else abs(rows - 0.3 * ROWS) < 2


def test_an_order_belongs_to_its_seed(documents):
    first = packed(documents).batch(0)["tokens_BT"]
    np.testing.assert_array_equal(first, packed(documents).batch(0)["tokens_BT"])
    assert (first != packed(documents, seed=1).batch(0)["tokens_BT"]).any()


def test_a_long_document_is_read_once_for_its_rows():
    documents = FakeDocuments([100 * ROW])
    batches = packed(documents)
    for step in range(10):
        batches.batch(step)
    assert documents.reads == 1


def test_a_far_step_reads_its_own_documents_alone(documents):
    batches = packed(documents)
    before = documents.reads
    batches.batch(10**9)
    assert documents.reads - before <= ROWS * ROW


def test_validation_has_every_document_once(documents):
    batches = list(PackedValidation(documents, sequence_length=ROW, batch_size=ROWS))
    assert predictions(batches) == pairs_of(documents)
    assert {batch["tokens_BT"].shape for batch in batches} == {SHAPE}


def test_nothing_to_predict_is_refused():
    with pytest.raises(DataError, match=r"dataset data/1 has no document with a token to predict"):
        packed(FakeDocuments([5]), FakeDocuments([1, 1]), packing="best_fit")
    with pytest.raises(DataError, match=r"dataset data/0 has no document"):
        packed(FakeDocuments([]))


# ---- onto the mesh


@pytest.mark.parametrize("prefetch", [0, 3])
def test_global_batches_are_split_and_in_order(documents, prefetch):
    batches = packed(documents)
    mesh = sharding.make_mesh(data=2, expert=2, tensor=2)
    steps = range(5, 11)
    placed = list(global_batches(batches, mesh, steps, prefetch))
    for step, arrays in zip(steps, placed, strict=True):
        for name, array in batches.batch(step).items():
            np.testing.assert_array_equal(arrays[name], array)
            assert arrays[name].sharding.spec == sharding.spec("batch", "length")


def test_what_cannot_be_read_is_said_from_the_thread_that_reads(tmp_path):
    folder = write_prepared(tmp_path / "data", [range(1, 20)] * 50)
    shard = tmp_path / "data" / "shard.arrayrecord"
    batches = packed(TokenDataset(folder))
    shard.unlink()
    with pytest.raises(DataError, match=r"shard .*shard\.arrayrecord is missing"):
        next(global_batches(batches, sharding.make_mesh(), range(3), 2))


HOST = Path(__file__).with_name("host.py")


def hashes_of(hosts: int, folders: list[str], port: int, steps: range) -> dict:
    """Hashes of all rows of `steps` by (step, row), made by `hosts` processes."""
    common = [
        f"localhost:{port}",
        "concat_then_split",
        "64",
        str(steps.start),
        str(steps.stop),
        *folders,
    ]
    commands = [[sys.executable, str(HOST), str(n), str(hosts), *common] for n in range(hosts)]
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, text=True) for c in commands]
    lines = [line.split() for process in running for line in process.communicate()[0].splitlines()]
    assert [process.returncode for process in running] == [0] * hosts
    assert len(lines) == ROWS * sum(2 if step in (6, 7, 8) else 1 for step in steps)
    return {(int(step), int(row)): digest for step, row, digest in lines}


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.prove)])
def test_batches_do_not_depend_on_hosts_or_where_a_run_resumed(tmp_path, before, after):
    folders = []
    for number in range(3):
        documents = FakeDocuments(random_lengths(200, 300, seed=number), 1 + 10**5 * number)
        tokens = [documents.tokens(index) for index in range(200)]
        folders.append(write_prepared(tmp_path / str(number), tokens))
    one = hashes_of(1, folders, free_port(), range(20))
    assert len(set(one.values())) == len(one)
    begun = hashes_of(before, folders, free_port(), range(7))
    resumed = hashes_of(after, folders, free_port(), range(7, 20))
    assert begun | resumed == one


# ---- in the model


def test_no_logit_depends_on_another_document_in_its_row(tiny_run):
    """Each document has tokens of its own; those of one are changed, and the others' logits keep
    every bit."""
    documents = FakeDocuments([5, 9, 11, 3, 40, 8, 20, 6, 7, 13] * 3)
    batch = packed(documents).batch(0)
    model = grok.init(tiny_run.model, jax.random.key(0))
    tokens_BT, segments_BT = batch["tokens_BT"], batch["segment_ids_BT"]
    assert len(np.unique(tokens_BT[segments_BT > 0])) == (segments_BT > 0).sum()

    def logits(tokens_BT):
        return np.asarray(model(jnp.array(tokens_BT), segments_BT, batch["positions_BT"]))

    before = logits(tokens_BT)
    for segment in (1, 2):
        changed = segments_BT == segment
        other_BT = np.where(changed, tokens_BT % 300 + 7, tokens_BT)
        after = logits(other_BT)
        np.testing.assert_array_equal(after[~changed], before[~changed])
        assert (after[changed] != before[changed]).any(-1).all()
