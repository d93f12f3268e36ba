"""Streams and batches: what is read, that every token is used, that steps are reproducible."""

import math

import jax
import numpy as np
import pytest

from grok import sharding
from grok.data.batch_schedule import BatchSchedule
from grok.data.device_feed import shard_batch
from grok.data.stream_batches import (
    StreamBatches,
    StreamValidation,
    TokenStream,
    bits_per_byte,
    read_stream,
)
from grok.data.tokenizers.sentencepiece import train_tokenizer
from grok.errors import DataError

EOS = 2


def stream_of(num_tokens: int) -> TokenStream:
    """A stream whose token ids are their places, so that a row shows where it was cut."""
    return TokenStream(
        tokens_S=np.arange(num_tokens, dtype=np.int32), num_bytes=3 * num_tokens, eos_id=EOS
    )


def batches_of(num_tokens: int, length: int = 8, rows: int = 4, seed: int = 0) -> StreamBatches:
    return StreamBatches(stream_of(num_tokens), BatchSchedule(length, rows), seed=seed)


def epoch_starts(batches: StreamBatches, epoch: int) -> np.ndarray:
    """First tokens of the rows of an epoch, for batches of one row."""
    rows = range(epoch * batches.rows_per_epoch, (epoch + 1) * batches.rows_per_epoch)
    return np.array([batches.batch(row)["tokens_BT"][0, 0] for row in rows])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    texts = ["one two three é\n" * 30, "four five six\n" * 20]
    paths = [folder / "a.txt", folder / "b.txt"]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text.encode())
    return paths, texts, train_tokenizer(paths, folder / "t.model", 310)


def test_stream_ends_every_document_with_eos(files):
    paths, texts, tokenizer = files
    stream = read_stream(paths, tokenizer, 310)
    ends = np.flatnonzero(stream.tokens_S == EOS)
    assert stream.tokens_S.dtype == np.int32
    assert len(ends) == 2
    assert ends[-1] == len(stream.tokens_S) - 1
    assert tokenizer.decode(stream.tokens_S[: ends[0]].tolist()) == texts[0]
    assert stream.num_bytes == sum(len(text.encode()) for text in texts)


def test_stream_refuses_files_that_are_no_text(files, tmp_path):
    _, _, tokenizer = files
    bad, empty = tmp_path / "bad.txt", tmp_path / "empty.txt"
    bad.write_bytes("é fine so far".encode() + b"\xff\xfe")
    empty.touch()
    with pytest.raises(DataError, match=r"bad\.txt is not UTF-8 at byte offset 14 \(0xff\)"):
        read_stream([bad], tokenizer, 310)
    with pytest.raises(DataError, match=r"empty\.txt is empty"):
        read_stream([empty], tokenizer, 310)
    with pytest.raises(DataError, match=r"none\.txt: cannot be read: No such file"):
        read_stream([tmp_path / "none.txt"], tokenizer, 310)
    with pytest.raises(DataError, match="no text files"):
        read_stream([], tokenizer, 310)


def test_stream_refuses_tokens_beyond_the_model(files):
    paths, _, tokenizer = files
    largest = max(tokenizer.encode(paths[0].read_text()))
    with pytest.raises(DataError, match=f"has token {largest}, but .*={largest};.*=310"):
        read_stream(paths, tokenizer, largest)


def test_batch_shapes_types_and_shift():
    batch = batches_of(1000).batch(0)
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
        "tokens_BT": ((4, 8), np.int32),
        "targets_BT": ((4, 8), np.int32),
        "mask_BT": ((4, 8), np.float32),
    }
    np.testing.assert_array_equal(batch["targets_BT"], (batch["tokens_BT"] + 1) % 1000)
    assert batch["mask_BT"].all()


def test_batch_is_a_function_of_seed_and_step():
    forward = batches_of(500)
    expected = [forward.batch(step) for step in range(40)]
    again = batches_of(500)
    for step in (39, 0, 17, 17):
        for name, array in again.batch(step).items():
            np.testing.assert_array_equal(array, expected[step][name])
    other = batches_of(500, seed=1).batch(0)
    assert (other["tokens_BT"] != expected[0]["tokens_BT"]).any()


def test_epoch_visits_every_window_once_in_new_order_at_new_places():
    length, size = 8, 803
    batches = batches_of(size, length, rows=1)
    assert batches.rows_per_epoch == 100
    epochs = [epoch_starts(batches, epoch) for epoch in range(3)]
    first_starts = set()
    for starts in epochs:
        # Around the ring, windows are `length` apart but for one gap that the rest falls into.
        gaps = np.sort(np.diff(np.sort(starts), append=starts.min() + size))
        assert gaps.tolist() == [length] * 99 + [length + 3]
        assert (np.diff(starts) != length).any()
        first_starts.add(int(starts[0]))
    assert len(first_starts) == 3
    assert len({tuple(np.sort(starts) % length) for starts in epochs}) > 1


def test_batches_run_over_the_end_of_an_epoch():
    one_row, three_rows = batches_of(81, rows=1), batches_of(81, rows=3)
    rows = [one_row.batch(row)["tokens_BT"][0] for row in range(30)]
    joined = [three_rows.batch(step)["tokens_BT"] for step in range(10)]
    np.testing.assert_array_equal(np.stack(rows), np.concatenate(joined))


def test_shortest_corpus_is_one_row_and_less_is_refused():
    assert batches_of(9).rows_per_epoch == 1
    with pytest.raises(DataError, match=r"has 8 tokens, and .*sequence_length=8 needs 9;.*=7"):
        batches_of(8)


@pytest.mark.parametrize("num_tokens", [1, 31, 32, 33, 100])
def test_validation_predicts_every_token_once(num_tokens):
    batches = StreamValidation(stream_of(num_tokens), sequence_length=8, batch_size=4)
    seen = list(batches)
    assert len(seen) == len(batches) == math.ceil(num_tokens / 32)
    assert (batches.num_tokens, batches.num_bytes) == (num_tokens, 3 * num_tokens)
    tokens, targets, mask = (
        np.concatenate([batch[name].reshape(-1) for batch in seen])
        for name in ("tokens_BT", "targets_BT", "mask_BT")
    )
    assert {batch["mask_BT"].shape for batch in seen} == {(4, 8)}
    np.testing.assert_array_equal(targets[mask == 1], np.arange(num_tokens))
    np.testing.assert_array_equal(tokens[mask == 1], [EOS, *range(num_tokens - 1)])
    assert mask.sum() == num_tokens
    assert mask.dtype == np.float32


def test_uniform_model_has_eight_bits_per_byte_over_bytes():
    assert bits_per_byte(100 * math.log(256), 100) == pytest.approx(8)


def test_to_mesh_splits_rows_over_devices():
    devices = jax.devices()
    batch = batches_of(1000, rows=2 * len(devices)).batch(3)
    mesh = sharding.make_mesh(devices=devices)
    placed = shard_batch(batch, mesh)
    for name, array in placed.items():
        np.testing.assert_array_equal(array, batch[name])
        assert array.sharding.spec == sharding.spec("batch", "length")
        assert {shard.data.shape for shard in array.addressable_shards} == {(2, 8)}


def test_without_a_mesh_arrays_are_plain():
    batch = batches_of(1000).batch(0)
    placed = shard_batch(batch, None)
    assert placed["tokens_BT"].dtype == np.int32
    np.testing.assert_array_equal(placed["targets_BT"], batch["targets_BT"])
