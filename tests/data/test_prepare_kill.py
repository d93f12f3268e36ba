"""A job that is killed at any point goes on, and its bytes are those of an undisturbed one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from grok.data.prepare.job import prepare_dataset
from grok.data.prepare.shards import ShardJournal, ShardWriter
from grok.errors import DataError
from tests.data.prepared import TEXTS, contents, make_tokenizer, options, prepare, write_lines

# Kills itself just before the n-th call of a function, as SIGKILL from outside would.
KILLED = """
import os, signal, sys
from grok.data.prepare import job, shards

def kill_before(owner, name, calls):
    function = getattr(owner, name)
    def counted(*args, **kwargs):
        nonlocal calls
        calls -= 1
        if calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    setattr(owner, name, counted)

def main():
    source, tokenizer, out, workers, owner, name, calls = sys.argv[1:]
    owners = {"writer": shards.ShardWriter, "journal": shards.ShardJournal, "os": os,
              "shards": shards, "storage": shards.storage, "shutil": shards.shutil}
    if owner:
        kill_before(owners[owner], name, int(calls))
    job.prepare_dataset(job.PrepareOptions(
        sources=(source,), tokenizer=tokenizer, shard_bytes=5000, drop_duplicates=True,
        max_bad_share=0.1, workers=int(workers)), out)

if __name__ == "__main__":
    main()
"""

POINTS = [
    ("writer", "write", 40),  # in the middle of a shard
    ("shards", "sync", 1),  # a shard is closed, not yet in place
    ("journal", "append", 2),  # in place, not yet in the journal
    ("writer", "write", 5),
    ("os", "replace", 3),  # another shard is closed, not yet in place
    ("writer", "write", 20),
    ("storage", "write_bytes", 1),  # all input is read: shards are renamed
    ("storage", "write_bytes", 4),  # all but the last is written
    ("shutil", "rmtree", 1),  # the manifest is in place
]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("kill")
    make_tokenizer(home)
    write_lines(home / "rows.jsonl", [*TEXTS[:80], TEXTS[4], "", *TEXTS[80:], TEXTS[81]])
    (home / "killed.py").write_text(KILLED)
    return home


def run(home: Path, out: Path, point: tuple[str, str, int], workers: int = 1) -> int:
    arguments = [home / "rows.jsonl", home / "t.model", out, workers, *point]
    return subprocess.run([sys.executable, home / "killed.py", *map(str, arguments)]).returncode


def undisturbed(home: Path, out: Path) -> dict[str, str]:
    source, tokenizer = str(home / "rows.jsonl"), str(home / "t.model")
    prepare(out, [source], tokenizer, drop_duplicates=True, max_bad_share=0.1)
    return contents(out)


def test_killed_at_many_points_and_resumed(home, tmp_path):
    out = tmp_path / "killed"
    for point in POINTS:
        assert run(home, out, point) == -signal.SIGKILL, point
    assert run(home, out, ("", "", 0)) == 0
    assert contents(out) == undisturbed(home, tmp_path / "whole")


def test_processes_end_with_the_one_that_was_killed(home, tmp_path):
    out = tmp_path / "killed"
    # Waits until all that hold the other end of the pipe, the workers too, are gone.
    arguments = [home / "rows.jsonl", home / "t.model", out, 2, "writer", "write", 60]
    done = subprocess.run(
        [sys.executable, home / "killed.py", *map(str, arguments)],
        stdout=subprocess.PIPE,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL
    assert run(home, out, ("", "", 0), workers=2) == 0
    assert contents(out) == undisturbed(home, tmp_path / "whole")


def test_finished_shards_are_not_made_again(home, tmp_path):
    out = tmp_path / "killed"
    run(home, out, ("writer", "write", 60))
    written = [os.stat(path).st_mtime_ns for path in sorted((out / "unfinished").glob("0*"))]
    assert written
    assert run(home, out, ("storage", "write_bytes", 1)) == -signal.SIGKILL
    shards = sorted(out.glob("shard-*"))
    assert [os.stat(path).st_mtime_ns for path in shards[: len(written)]] == written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard_bytes": 6000}, "options.shard_bytes was 5000 and is 6000"),
        ({"drop_duplicates": False}, "options.drop_duplicates was true and is false"),
        ({"tokenizer": "other"}, "tokenizer.sha256 was"),
        ({"text": b'{"text": "changed"}\n'}, "sources was"),
    ],
)
def test_a_changed_job_does_not_go_on(home, tmp_path, change, message):
    source, tokenizer = tmp_path / "rows.jsonl", str(home / "t.model")
    source.write_bytes((home / "rows.jsonl").read_bytes())
    job = {"drop_duplicates": True, "max_bad_share": 0.0}
    with pytest.raises(DataError, match="are bad"):
        prepare(tmp_path / "out", [str(source)], tokenizer, **job)
    if "text" in change:
        source.write_bytes(change.pop("text"))
    if "tokenizer" in change:
        other = tmp_path / "other"
        other.mkdir()
        (other / "t.model").write_bytes(Path(tokenizer).read_bytes() + b"\x32\x00")
        tokenizer, change = str(other / "t.model"), {}
    with pytest.raises(DataError, match=message):
        prepare(tmp_path / "out", [str(source)], tokenizer, **{**job, **change})


def test_two_at_once_are_refused(home, tmp_path):
    job = options([str(home / "rows.jsonl")], str(home / "t.model"))
    with (
        ShardJournal(tmp_path / "out" / "unfinished", {}),
        pytest.raises(DataError, match="another process is writing here"),
    ):
        prepare_dataset(job, tmp_path / "out")


def test_a_journal_comes_back_as_it_was(tmp_path):
    journal = ShardJournal(tmp_path / "unfinished", {"options": {}})
    writer = ShardWriter(journal, 100)
    writer.entry.rejected.append({"file": "x", "line": 1, "reason": "is empty"})
    writer.entry.add(2, rejected=1)
    writer.finish((3, 14), is_last=True)
    with journal:
        pass
    with ShardJournal(tmp_path / "unfinished", {"options": {}}) as again:
        assert again.entries == journal.entries
        assert again.is_complete and again.position == (3, 14)
