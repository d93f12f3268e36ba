"""A job in a folder: entries survive kills, other jobs and other processes are refused."""

import pytest

from grok.errors import CheckpointError
from grok.resumable import Journal, difference


def test_entries_are_read_again_without_a_torn_last_line(tmp_path):
    path = tmp_path / "job" / "journal.jsonl"
    with Journal(path, {"seed": (1, 2)}, CheckpointError, sync=True) as journal:
        journal.append({"shard": 0})
        journal.append({"shard": 1})
    path.write_bytes(path.read_bytes() + b'{"shard": ')
    with Journal(path, {"seed": (1, 2)}, CheckpointError) as journal:
        assert journal.entries == [{"shard": 0}, {"shard": 1}]
        journal.append({"shard": 2})
    assert path.read_bytes().count(b"\n") == 4


def test_another_job_is_refused(tmp_path):
    with Journal(tmp_path / "journal.jsonl", {"options": {"bytes": 5}}, CheckpointError):
        pass
    with pytest.raises(CheckpointError, match=r"\(options\.bytes was 5 and is 6\); delete it"):
        Journal(tmp_path / "journal.jsonl", {"options": {"bytes": 6}}, CheckpointError)


def test_difference_names_the_first_value():
    before = {"a": [1], "b": {"c": "x" * 100, "d": 1}}
    assert difference(before, {"a": (1,), "b": {"c": "x" * 100, "d": 1}}) == ""
    assert difference(before, {"a": (1,), "b": {"d": 2}}) == "b.d was 1 and is 2"
    assert difference({}, {"a": "x" * 100}) == f'a was null and is "{"x" * 69}...'
