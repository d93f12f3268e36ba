"""A job in a folder that continues after an interruption: its lock, identity, and finished pieces.
The identity is plain data that the output depends on: a command of another one is refused."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from grok import storage
from grok.errors import GrokError

# Longest value in a message.
SHOWN_CHARACTERS = 70


class Journal(contextlib.AbstractContextManager):
    """A file of JSON lines: the job's identity, then an entry for each finished piece. Opening
    locks it and reads `entries`, without a line that a kill cut short. Raises `error` where another
    process has it open, or it is of another job. With `sync`, `append` waits for the disk."""

    def __init__(
        self, path: Path, identity: Mapping[str, Any], error: type[GrokError], sync: bool = False
    ):
        self.path, self._error, self._sync = path, error, sync
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)
        try:
            self.entries = self._open(identity)
        except BaseException:
            self._file.close()
            raise

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, entry: dict[str, Any]) -> None:
        """Notes a finished piece."""
        self._write(entry)
        self.entries.append(entry)

    def _open(self, identity: Mapping[str, Any]) -> list[dict[str, Any]]:
        folder = self.path.parent
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"{folder}: another process is writing here; wait for its end."
            raise self._error(message) from None
        self._file.seek(0)
        data, lines = self._file.read(), None
        with contextlib.suppress(ValueError):
            lines = journal_lines(data)
        torn_identity = not lines and _line(identity).startswith(data)
        if lines is None or not (lines or torn_identity):
            remedy = f"delete {folder}, or name another folder"
            raise self._error(f"{self.path}: is no journal of grok; {remedy}.")
        self._file.truncate(data.rfind(b"\n") + 1)
        if not lines:
            self._write(identity)
            return []
        if changed := difference(lines[0], identity):
            raise self._error(
                f"{folder}: has an unfinished job of other input or settings ({changed}); "
                "delete it, or name another folder."
            )
        return lines[1:]

    def _write(self, line: Mapping[str, Any]) -> None:
        # In one call, and unbuffered: a kill leaves all of it or, at worst, a torn last line.
        self._file.write(_line(line))
        if self._sync:
            os.fsync(self._file.fileno())


def _line(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data).encode() + b"\n"


def journal_lines(data: bytes) -> list[dict[str, Any]]:
    """The complete lines of a journal, its identity first. Raises ValueError for other data."""
    lines = [json.loads(line) for line in data.splitlines(keepends=True) if line.endswith(b"\n")]
    if not all(isinstance(line, dict) for line in lines):
        raise ValueError
    return lines


def difference(before: Any, now: Any) -> str:
    """Names the first value in which two identities differ; empty where they are equal."""
    return next(_differences(before, json.loads(json.dumps(now)), ""), "")


def _differences(before: Any, now: Any, key: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**now, **before}:
            inner = f"{key}.{name}" if key else name
            yield from _differences(before.get(name), now.get(name), inner)
    elif before != now:
        yield f"{key} was {_shortened(before)} and is {_shortened(now)}"


def _shortened(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def check_destination(folder: storage.StrPath, unfinished: str, error: type[GrokError]) -> None:
    """Raises `error` unless `folder` is local, and new, empty, or has the file `unfinished` of a
    job that can continue."""
    if storage.is_remote(folder):
        remedy = "which can then be copied, as by `gcloud storage cp --recursive`"
        raise error(f"{folder}: the output goes to a local folder, {remedy}.")
    if not storage.exists(folder, error):
        return
    present = storage.list_files(folder, error)
    others = sorted(name for name in present if not name.startswith("."))
    if others and unfinished not in present:
        raise error(f"{folder}: is not empty (it has {others[0]}); name another folder.")


def check_space(folder: Path, nbytes: int, error: type[GrokError]) -> None:
    """Raises `error` where the disk has no room for `nbytes` more bytes."""
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise error(f"{folder}: {nbytes:,} bytes will be written, and the disk has {free:,} free.")


@contextlib.contextmanager
def continuable(folder: storage.StrPath, error: type[GrokError]) -> Iterator[None]:
    """Turns an OSError inside into `error`, which says that the job can continue."""
    try:
        yield
    except OSError as cause:
        problem = f"{cause.filename or folder}: cannot be written: {storage.reason(cause)}"
        raise error(f"{problem}. Finished pieces stay; the same command continues.") from cause
