"""Small files and folders, on this machine and in a bucket: the same answers from both."""

import os

import pytest

from grok import storage
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
