"""Datasets at gs:// are the same, document by document and batch by batch, as on this machine."""

import errno
import itertools
import os
import random

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from grok import storage
from grok.data.array_record import BLOCK, read_chunk, read_offsets
from grok.data.batch_schedule import BatchSchedule, Mixture
from grok.data.dataset import TokenDataset
from grok.data.packed_batches import PackedBatches, PackedValidation
from grok.data.prepare.shards import WRITER_OPTIONS, verify_dataset
from grok.data.remote_records import RecordCache
from grok.errors import DataError
from tests.data.prepared import TEXTS, make_tokenizer, prepare, write_lines
from tests.emulator import bucket


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One dataset of several shards on this machine and in a bucket."""
    folder = tmp_path_factory.mktemp("data")
    here = folder / "here"
    texts = [*TEXTS, "long " * 30_000]
    prepare(here, [write_lines(folder / "a.jsonl", texts)], make_tokenizer(folder))
    with bucket():
        for file in here.iterdir():
            storage.copy(file, f"gs://bucket/data/{file.name}")
        yield here, "gs://bucket/data"


def test_records_of_any_size_are_found_between_the_headers_of_blocks(tmp_path):
    rng, path = random.Random(3), tmp_path / "a.arrayrecord"
    near = [BLOCK - 64 - 24 - 44 + n for n in range(-3, 4)]
    for records in (
        [b""],
        [rng.randbytes(rng.choice([0, 1, 90, 3000, *near])) for _ in range(500)],
    ):
        writer = ArrayRecordWriter(str(path), WRITER_OPTIONS)
        for record in records:
            writer.write(record)
        writer.close()
        data = path.read_bytes()
        offsets = read_offsets(len(data), lambda begin, end, data=data: data[begin:end])
        chunks = [read_chunk(data[a:b], a, a) for a, b in itertools.pairwise(offsets.tolist())]
        assert chunks == [[record] for record in records]


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a.arrayrecord"
    for options in ("group_size:2,uncompressed", "group_size:1,zstd:3"):
        writer = ArrayRecordWriter(str(path), options)
        for _ in range(4):
            writer.write(b"a" * 100)
        writer.close()
        data = path.read_bytes()
        with pytest.raises(ValueError, match=r"several documents each|or compressed"):
            read_offsets(len(data), lambda begin, end, data=data: data[begin:end])
    for size in (0, 100, 3 * BLOCK):
        with pytest.raises(ValueError, match=r"no ArrayRecord|another kind"):
            read_offsets(size, lambda begin, end: bytes(end - begin))


def test_a_footer_whose_chunks_are_out_of_order_is_refused(tmp_path):
    path = tmp_path / "a.arrayrecord"
    writer = ArrayRecordWriter(str(path), WRITER_OPTIONS)
    for size in (100, 200, 300):
        writer.write(bytes(size))
    writer.close()
    data = path.read_bytes()
    offsets = read_offsets(len(data), lambda begin, end: data[begin:end]).tolist()
    footer = offsets[-1]
    third = bytes([8, offsets[2] & 0x7F | 0x80, offsets[2] >> 7])
    at = data.index(third, footer)
    second = bytes([8, offsets[1] & 0x7F | 0x80, offsets[1] >> 7])
    swapped = data[:at] + second + data[at + len(second) :]
    with pytest.raises(ValueError, match="not in order"):
        read_offsets(len(data), lambda begin, end: swapped[begin:end])


def test_every_document_is_the_same(folders):
    here, there = map(TokenDataset, folders)
    assert (here.hash, here.lengths.tolist()) == (there.hash, there.lengths.tolist())
    there.prefetch([5, 6, 7, 60, 1])
    for index in range(len(here)):
        ours, theirs = here[index], there[index]
        assert np.array_equal(ours.tokens_S, theirs.tokens_S)
        assert ours.metadata == theirs.metadata


@pytest.mark.parametrize("cache_bytes", [1 << 30, 5000])
@pytest.mark.parametrize("packing", ["concat_then_split", "best_fit"])
def test_every_batch_is_the_same_however_little_is_kept(folders, packing, cache_bytes):
    def batches(dataset: TokenDataset) -> list[dict]:
        schedule = BatchSchedule(128, 4, ())
        packed = PackedBatches(
            {"a": dataset}, Mixture([1.0], []), schedule, seed=1, packing=packing
        )
        held_out = PackedValidation(dataset, sequence_length=128, batch_size=4)
        predicted = int(dataset.lengths.sum()) - len(dataset)
        assert held_out.num_bytes(np.ones(384, np.int64)) == predicted
        return [*map(packed.batch, range(30)), *held_out]

    here, there = folders
    ours, theirs = batches(TokenDataset(here)), batches(TokenDataset(there, cache_bytes))
    for one, other in zip(ours, theirs, strict=True):
        for name in one:
            assert np.array_equal(one[name], other[name])


def test_a_second_epoch_requests_nothing(folders, monkeypatch):
    _, there = folders
    dataset = TokenDataset(there)
    dataset.prefetch(range(len(dataset)))
    monkeypatch.setattr(storage, "read_ranges", None)
    dataset.prefetch(range(len(dataset)))
    lengths = [len(dataset[index].tokens_S) for index in range(len(dataset))]
    assert lengths == dataset.lengths.tolist()


def test_documents_that_follow_each_other_are_one_request(folders, monkeypatch):
    _, there = folders
    dataset = TokenDataset(there)
    requests = []
    read_ranges = storage.read_ranges

    def count(path, starts, out, error):
        requests.append(len(out))
        read_ranges(path, starts, out, error)

    monkeypatch.setattr(storage, "read_ranges", count)
    dataset.prefetch([0])
    assert len(requests) == 3  # the shard's end, its footer, the document
    dataset.prefetch([1, 2, 3, 5, 0])
    assert len(requests) == 5


def test_a_damaged_or_missing_shard_is_named(folders, tmp_path):
    _, there = folders
    manifest = TokenDataset(there).manifest
    for name in storage.list_files(there):
        storage.copy(f"{there}/{name}", f"gs://bucket/other/{name}")
    shard = manifest["shards"][0]["name"]
    assert verify_dataset("gs://bucket/other") == []
    data = bytearray(storage.read_bytes(f"{there}/{shard}"))
    data[64:104] = bytes(40)  # the header of the first document's chunk
    storage.write_bytes(f"gs://bucket/other/{shard}", bytes(data))
    with pytest.raises(DataError, match=rf"other/{shard} is damaged .*inspect --check"):
        TokenDataset("gs://bucket/other")[0]
    (problem,) = verify_dataset("gs://bucket/other")
    assert problem.startswith(f"{shard} does not match its manifest")
    storage.remove(f"gs://bucket/other/{shard}")
    with pytest.raises(DataError, match=f"other/{shard}: cannot be read: No such file"):
        TokenDataset("gs://bucket/other")[0]


def test_the_cache_has_the_newest_records_and_no_more_bytes_than_it_may():
    rng = random.Random(1)
    cache, records = RecordCache(1000), {}
    for number in range(300):
        records[number] = os.urandom(rng.choice([1, 10, 90, 333, 1000]))
        cache.put(number, records[number])
        held = [n for n in records if n in cache]
        assert all(cache.get(n) == records[n] for n in held)
        assert held[-1] == number
        assert sum(len(records[n]) for n in held) <= 1000
    cache.put(301, bytes(1001))
    assert cache.get(301) is None


def test_a_full_disk_makes_the_cache_smaller(monkeypatch):
    write = os.pwrite

    def write_to_full_disk(descriptor: int, data: bytes, offset: int) -> int:
        if offset >= 600:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[: 600 - offset], offset)

    monkeypatch.setattr(os, "pwrite", write_to_full_disk)
    cache, records = RecordCache(1000), [os.urandom(90) for _ in range(40)]
    for number, record in enumerate(records):
        cache.put(number, record)
        assert cache.get(number) in ((None,) if number == 6 else (record,))
        held = [n for n in range(40) if n in cache]
        assert all(cache.get(n) == records[n] for n in held)
    assert held == list(range(34, 40))
