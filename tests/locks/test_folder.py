"""One job at a time works in a folder, here or in a bucket, and a dead one blocks nobody."""

import dataclasses
import os
import re
import signal
import subprocess
import sys

import pytest

from grok import storage
from grok.errors import RESTART, ConfigError, FolderInUse
from grok.locks import local, object
from grok.locks.folder import LOCK_FILE, check_free, hold_folder
from grok.locks.object import ObjectLock
from grok.locks.owner import Owner
from tests.emulator import bucket

# A process that holds the lock of a folder, says so, and waits for its end.
HOLDER = """
import sys
from grok.locks.folder import hold_folder
with hold_folder(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def emulated():
    with bucket() as client:
        yield client


@pytest.fixture(params=["here", "bucket"])
def folder(request, tmp_path, emulated) -> str:
    run = f"gs://bucket/{tmp_path.name}" if request.param == "bucket" else str(tmp_path)
    return storage.join(run, "run")


@pytest.fixture
def holder(folder):
    command = [sys.executable, "-c", HOLDER, folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def elsewhere(**changes) -> Owner:
    """The owner of a lock on another machine."""
    return dataclasses.replace(Owner.this_process(), machine="other", token="t", **changes)


def test_the_second_is_refused_with_the_name_of_the_first_until_that_ends(folder, holder):
    with pytest.raises(FolderInUse) as refusal, hold_folder(folder):
        pass
    assert re.fullmatch(
        rf"{folder}: another process is writing here \(process {holder.pid} on \S+, of user \S+, "
        r"since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC\); wait for its end, or name another folder\.",
        str(refusal.value),
    )
    assert refusal.value.exit_code == RESTART
    with pytest.raises(FolderInUse, match=f"process {holder.pid} on"):
        check_free(folder)
    holder.stdin.close()
    assert holder.wait() == 0
    check_free(folder)
    with hold_folder(folder):
        assert LOCK_FILE in storage.list_files(folder)


def test_a_killed_process_blocks_nobody(folder, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with hold_folder(folder):
        pass


def test_a_stopped_process_of_this_machine_keeps_it_however_silent(folder, holder, monkeypatch):
    monkeypatch.setattr(object, "SILENT_SECONDS", -10)
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(FolderInUse), hold_folder(folder):
        pass


def test_nothing_is_left_of_a_lock(folder, tmp_path):
    with hold_folder(storage.join(folder, "also", "new")):
        pass
    assert not storage.exists(folder)
    with hold_folder(folder):
        storage.write_bytes(storage.join(folder, "answers"), b"1")
    assert storage.list_tree(folder) == {"answers": 1}


def test_parts_of_one_job_work_beside_each_other_and_not_beside_the_whole(folder):
    with hold_folder(folder, share=(0, 2)), hold_folder(folder, share=(1, 2)):
        for share in ((1, 2), (0, 1), (2, 3)):
            with pytest.raises(FolderInUse), hold_folder(folder, share=share):
                pass
    with hold_folder(folder), pytest.raises(FolderInUse), hold_folder(folder, share=(0, 2)):
        pass


def test_an_owner_elsewhere_is_dead_when_it_is_silent_for_long(emulated, monkeypatch):
    folder = "gs://bucket/silent"
    lock = ObjectLock(f"{folder}/{LOCK_FILE}")
    assert lock.acquire(elsewhere()) is None
    with pytest.raises(FolderInUse), hold_folder(folder):
        pass
    assert lock.renew() is None
    monkeypatch.setattr(object, "SILENT_SECONDS", -10)
    with hold_folder(folder):
        monkeypatch.undo()
        # It wakes up, and learns that it has lost the lock.
        owner = lock.renew()
        assert owner is not None and owner.pid == os.getpid()


def test_an_owner_that_lost_its_lock_is_told(emulated, monkeypatch):
    monkeypatch.setattr(object, "RENEW_SECONDS", 0.01)
    folder, sentences = "gs://bucket/lost", []
    with hold_folder(folder, on_lost=sentences.append):
        (renewing,) = (t for t in object.threading.enumerate() if t.name == object.THREAD_NAME)
        other = ObjectLock(f"{folder}/{LOCK_FILE}")
        monkeypatch.setattr(Owner, "is_dead", True)
        assert other.acquire(elsewhere(host="far")) is None
        monkeypatch.undo()
        renewing.join(60)
    (sentence,) = sentences
    assert sentence.startswith(f"{folder}: another process took over (process ")
    assert " on far, of user " in sentence
    # It is the other's now, and stays.
    assert other.owner().host == "far"


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(
            ConfigError, match=r"file/run cannot be written: Not a directory; a folder that"
        ),
        hold_folder(tmp_path / "file" / "run"),
    ):
        pass


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def refuse(*_) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(local.fcntl, "flock", refuse)
    with hold_folder(tmp_path):
        pass
    assert "its file system has no locks; start no second job there" in capsys.readouterr().err
