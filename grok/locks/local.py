"""A lock by a file on this machine, or on a disk that several mount; the kernel frees it with the
process that holds it."""

import contextlib
import errno
import fcntl
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

from grok.locks.owner import Owner

# Errors by which a file system says that it has no locks.
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


class LocalLock:
    """A lock by the file `path`, whose folder is made where it is not there."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._file: IO[bytes] | None = None
        self._new_folders: list[Path] = []

    def acquire(self, owner: Owner) -> Owner | None:
        """Takes the lock; returns the owner where another has it."""
        self._new_folders = [p for p in self._path.parents if not p.exists()]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = self._path.open("a+b")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with file:
                    file.seek(0)
                    return Owner.from_bytes(file.read())
            except OSError as error:
                file.close()
                if error.errno not in NO_LOCKS:
                    raise
                folder = self._path.parent
                no_locks = f"{folder}: its file system has no locks; start no second job there"
                print(no_locks, file=sys.stderr, flush=True)
                return None
            # The one before may have deleted the file after it was opened here.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), self._path.stat()):
                    break
            file.close()
        file.truncate(0)
        file.write(owner.to_bytes())
        file.flush()
        self._file = file
        return None

    def owner(self) -> Owner | None:
        """The process that has the lock, None where none has."""
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return Owner.from_bytes(file.read())
            except OSError:
                return None
        return None

    def keep(self, on_lost: Callable[[str], object]) -> None:
        """Does nothing: nobody can take it over."""

    def release(self) -> None:
        """Gives the lock up; folders that were made for it and are empty go, too."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()
            self._file.close()
        with contextlib.suppress(OSError):
            for folder in self._new_folders:
                folder.rmdir()
