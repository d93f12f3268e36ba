"""The lock of a folder, here or at gs://, that one job at a time writes. It names its owner, and
does not outlive it: on this machine the kernel frees it with the process, and at gs:// it is taken
over from an owner that is dead or silent."""

import contextlib
import re
from collections.abc import Callable, Iterator

from grok import storage
from grok.errors import ConfigError, FolderInUse, GrokError
from grok.locks.local import LocalLock
from grok.locks.object import ObjectLock
from grok.locks.owner import Owner

LOCK_FILE = ".lock"


@contextlib.contextmanager
def hold_folder(
    folder: storage.StrPath,
    in_use: type[GrokError] = FolderInUse,
    unwritable: type[GrokError] = ConfigError,
    *,
    share: tuple[int, int] = (0, 1),
    on_lost: Callable[[str], object] = print,
) -> Iterator[None]:
    """Holds the lock of a folder, which is made where it is not there, or, of a job that several
    processes share, of number share[0] of share[1] parts. Raises `in_use`, naming the owner, where
    another process has that or works on other parts than these, and `unwritable` where it cannot
    be taken. `on_lost` is called, in another thread, with a sentence when it was taken over."""
    index, count = share
    name = LOCK_FILE if count == 1 else f"{LOCK_FILE}-{index}-of-{count}"
    lock = _lock(storage.join(folder, name))
    try:
        try:
            owner = lock.acquire(Owner.this_process()) or _other_owner(folder, count)
        except OSError as error:
            problem = f"{folder} cannot be written: {storage.reason(error)}"
            raise unwritable(f"{problem}; a folder that can be would work.") from None
        if owner is not None:
            raise in_use(_refusal(folder, owner))
        lock.keep(on_lost)
        yield
    finally:
        lock.release()


def find_owner(folder: storage.StrPath) -> Owner | None:
    """The process that holds the lock of a folder, None where none is known to."""
    with contextlib.suppress(OSError):
        return _lock(storage.join(folder, LOCK_FILE)).owner()
    return None


def check_free(folder: storage.StrPath) -> None:
    """Raises FolderInUse where another process holds the lock of a folder. A command that works
    alone asks this before it loads what takes long; it takes the lock later, which tells of a
    folder that cannot be read."""
    if (owner := find_owner(folder)) is not None:
        raise FolderInUse(_refusal(folder, owner))


def _refusal(folder: storage.StrPath, owner: Owner) -> str:
    problem = f"{folder}: another process is writing here ({owner})"
    return f"{problem}; wait for its end, or name another folder."


def _lock(path: str) -> LocalLock | ObjectLock:
    return ObjectLock(path) if storage.is_remote(path) else LocalLock(path)


def _other_owner(folder: storage.StrPath, count: int) -> Owner | None:
    """The owner of a lock of the folder's job cut into another number of parts, None without."""
    for name in storage.list_files(folder):
        parts = re.fullmatch(rf"{re.escape(LOCK_FILE)}(?:-\d+-of-(\d+))?", name)
        is_other = parts is not None and int(parts[1] or 1) != count
        if is_other and (owner := _lock(storage.join(folder, name)).owner()) is not None:
            return owner
    return None
