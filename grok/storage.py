"""Files on this machine or at gs://: listed, opened, written whole, copied.

Whatever goes wrong is an OSError, also for what clients of remote storage raise; `reason` says it
in a few words. Callers make the sentence, since they know what the file is for.
"""

import contextlib
import functools
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from grok.errors import GrokError

StrPath = str | os.PathLike[str]


def is_remote(path: StrPath) -> bool:
    """Whether `path` is a URL such as gs://bucket/folder."""
    return "://" in os.fspath(path)


def join(path: StrPath, *names: str) -> str:
    """The path of something inside the folder `path`."""
    return "/".join([os.fspath(path).rstrip("/"), *names])


def exists(path: StrPath) -> bool:
    """Whether there is a file or folder at `path`."""
    if not is_remote(path):
        return Path(path).exists()
    with errors(path):
        system, inside = remote(path)
        return system.exists(inside)


def list_files(folder: StrPath) -> dict[str, int | None]:
    """What is in a folder: bytes of each file by name, None for a folder in it."""
    if not is_remote(folder):
        with os.scandir(folder) as entries:
            return {entry.name: _size(entry) for entry in entries}
    with errors(folder):
        system, inside = remote(folder)
        found = {entry["name"]: entry for entry in system.ls(inside, detail=True)}
    if list(found) == [inside.rstrip("/")]:
        raise NotADirectoryError("Not a directory")
    return {
        name.rstrip("/").rsplit("/", 1)[-1]: (
            None if entry["type"] == "directory" else entry["size"]
        )
        for name, entry in found.items()
        # Consoles mark a folder by an empty object of its name.
        if name.rstrip("/") != inside.rstrip("/")
    }


def list_tree(folder: StrPath) -> dict[str, int]:
    """Bytes of all files below a folder, by their path in it."""
    if not is_remote(folder):
        root = Path(folder)
        return {
            path.relative_to(root).as_posix(): path.stat().st_size
            for path in root.rglob("*")
            if path.is_file()
        }
    with errors(folder):
        system, inside = remote(folder)
        prefix = f"{inside.rstrip('/')}/"
        return {
            name.removeprefix(prefix): entry["size"]
            for name, entry in system.find(inside, detail=True).items()
            if name.startswith(prefix) and not name.endswith("/")
        }


@contextlib.contextmanager
def open_file(path: StrPath, block_size: int | None = None) -> Iterator[BinaryIO]:
    """The file for reading; of a remote one, `block_size` bytes are fetched at a time."""
    if not is_remote(path):
        with open(path, "rb") as file:
            yield file
        return
    with errors(path):
        system, inside = remote(path)
        with system.open(inside, "rb", block_size=block_size, cache_type="readahead") as file:
            yield file


def read_bytes(path: StrPath) -> bytes:
    """A whole small file."""
    with open_file(path) as file:
        return file.read()


def write_bytes(path: StrPath, data: bytes) -> None:
    """Makes or replaces a small file, and the folders it is in: all of it, or nothing, also where
    several processes write it at once."""
    if is_remote(path):
        with errors(path):
            system, inside = remote(path)
            system.pipe_file(inside, data)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(4)}.unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(target)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def copy(source: StrPath, target: StrPath) -> None:
    """Copies a small file, each end here or at gs://, as `write_bytes` writes it."""
    write_bytes(target, read_bytes(source))


def move(source: StrPath, target: StrPath) -> None:
    """Renames a folder, both here or both at gs://; `target` must not be there.

    Here that is one step; in a bucket all files are copied, inside it, and then deleted.
    """
    if not is_remote(source):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        os.rename(source, target)
        return
    with errors(source):
        system, inside = remote(source)
        # Its own `mv` asks for a renaming that emulators do not know.
        for name in list_tree(source):
            system.cp_file(f"{inside}/{name}", f"{remote(target)[1]}/{name}")
        system.rm(inside, recursive=True)


def remove(path: StrPath) -> None:
    """Deletes a file, or a folder and all in it."""
    if is_remote(path):
        with errors(path):
            system, inside = remote(path)
            system.rm(inside, recursive=True)
    elif Path(path).is_dir():
        shutil.rmtree(path)
    else:
        os.remove(path)


def remote(path: StrPath) -> tuple[Any, str]:
    """The file system of a URL, an `fsspec` one, and the path in it."""
    url = os.fspath(path)
    if not url.startswith("gs://"):
        raise OSError("it is neither on this machine nor at gs://")
    return google_storage("STORAGE_EMULATOR_HOST" in os.environ), url.removeprefix("gs://")


@functools.cache
def google_storage(emulated: bool) -> Any:
    """The client of gs://, or of an emulator that the environment names."""
    # It would ask each bucket's layout by gRPC first, for minutes where nothing answers.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # Imported late: it takes a second, which local files need not cost.
    from gcsfs.core import GCSFileSystem  # type: ignore[import-untyped]

    # It logs each refusal with a stack trace; what a user should know is raised as well.
    logging.getLogger("gcsfs").addHandler(logging.NullHandler())
    return GCSFileSystem(**_options(emulated))


def prepare(folder: StrPath) -> None:
    """Readies the clients that libraries make by themselves for gs://, where `folder` is there."""
    if is_remote(folder):
        import fsspec.config

        remote(folder)
        fsspec.config.conf.setdefault("gcs", {}).update(
            _options("STORAGE_EMULATOR_HOST" in os.environ)
        )


def _options(emulated: bool) -> dict[str, Any]:
    # An emulator knows no accounts, and looking for one would ask Google's servers. What was listed
    # is not kept, since others write there.
    return {"token": "anon" if emulated else None, "use_listings_cache": False}


@contextlib.contextmanager
def errors(path: StrPath) -> Iterator[None]:
    """Makes an OSError of whatever a client of remote storage raises of `path`."""
    try:
        yield
    except (OSError, GrokError):
        raise
    except Exception as error:
        # What these clients raise (HTTP, accounts, retries) has no class in common.
        if not is_remote(path):
            raise
        raise OSError(str(error) or type(error).__name__) from error


def reason(error: OSError) -> str:
    """What went wrong, in a few words without the path."""
    if isinstance(error, FileNotFoundError):
        return "No such file or directory"
    return error.strerror or str(error) or type(error).__name__


def _size(entry: os.DirEntry[str]) -> int | None:
    try:
        return None if entry.is_dir() else entry.stat().st_size
    except OSError:
        # A link that leads nowhere: whoever needs the file hears of it on opening.
        return entry.stat(follow_symlinks=False).st_size
