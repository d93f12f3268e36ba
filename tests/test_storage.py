"""Small files and folders, on this machine and in a bucket: the same answers from both."""

import os

import fsspec
import numpy as np
import pytest

from grok import byte_ranges, storage
from tests.emulator import bucket


@pytest.fixture(scope="module")
def emulated():
    with bucket() as client:
        yield client


@pytest.fixture(params=["here", "bucket"])
def folder(request, tmp_path, emulated) -> str:
    return str(tmp_path) if request.param == "here" else f"gs://bucket/{tmp_path.name}"


def test_files_are_written_listed_copied_moved_and_deleted(folder):
    run = storage.join(folder, "run")
    storage.write_bytes(storage.join(run, "a", "one"), b"12345")
    storage.write_bytes(storage.join(run, "a", "one"), b"123")
    storage.copy(storage.join(run, "a", "one"), storage.join(run, "two"))
    assert storage.read_bytes(storage.join(run, "two")) == b"123"
    assert storage.list_files(run) == {"a": None, "two": 3}
    assert storage.list_tree(run) == {"a/one": 3, "two": 3}
    storage.move(storage.join(run, "a"), storage.join(run, "aside", "b"))
    assert storage.list_tree(run) == {"aside/b/one": 3, "two": 3}
    storage.remove(storage.join(run, "two"))
    storage.remove(storage.join(run, "aside"))
    assert not storage.exists(storage.join(run, "two"))
    assert not storage.exists(storage.join(run, "aside", "b", "one"))


NAMES = (
    "run[1]",
    "run1",
    "run *",
    "run x",
    "run?",
    "runx",
    "run#1",
    "run%20",
    "run'",
    "~run",
    "ü&+",
)


def test_any_character_of_a_name_is_only_itself(folder):
    for name in NAMES:
        storage.write_bytes(storage.join(folder, name, f"file {name}"), name.encode())
    for name in NAMES:
        file = storage.join(folder, name, f"file {name}")
        assert storage.read_bytes(file) == name.encode()
        assert storage.list_files(storage.join(folder, name)) == {
            f"file {name}": len(name.encode())
        }
        storage.move(storage.join(folder, name), storage.join(folder, "moved", name))
        assert not storage.exists(file)
    for count, name in enumerate(NAMES):
        assert len(storage.list_tree(folder)) == len(NAMES) - count
        storage.remove(storage.join(folder, "moved", name))


def test_what_is_not_there(folder):
    missing = storage.join(folder, "missing")
    for act in (storage.read_bytes, storage.list_files, storage.remove):
        with pytest.raises(FileNotFoundError) as error:
            act(missing)
        assert storage.reason(error.value) == "No such file or directory"


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        storage.write_bytes(path, b"after")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_ranges_are_read_in_requests_of_bounded_size(monkeypatch):
    data = np.random.default_rng(0).integers(0, 256, 4000, np.uint8).tobytes()
    files = fsspec.filesystem("memory")
    files.pipe_file("/bucket/ranges", data)
    monkeypatch.setattr(storage, "google_storage", lambda _: files)
    monkeypatch.setattr(byte_ranges, "REQUEST_BYTES", 100)
    monkeypatch.setattr(byte_ranges, "GAP_BYTES", 5)
    for starts, length in (
        ([0], 4000),
        ([0, 300, 1000, 1010], 8),
        ([7, 457, 907], 300),
        (range(0, 3990, 9), 4),
    ):
        out = bytearray(length * len(starts))
        storage.read_ranges("gs://bucket/ranges", [*starts], memoryview(out))
        assert out == b"".join(data[start : start + length] for start in starts)
        requests = [*byte_ranges.requests([*starts], length)]
        assert max(end - begin for begin, end in requests) <= 100
    # Gaps of five are read, those of hundreds are not, and half of a range is the limit.
    assert [*byte_ranges.requests([0, 300, 1000, 1010], 8)] == [(0, 8), (300, 308), (1000, 1018)]
    assert sum(end - begin for begin, end in byte_ranges.requests([7, 457, 907], 300)) == 1200
    assert sum(end - begin for begin, end in byte_ranges.requests([7, 458, 909], 300)) == 900
    out = bytearray(8)
    with pytest.raises(OSError, match="it became shorter while it was read"):
        storage.read_ranges("gs://bucket/ranges", [3996], memoryview(out))
