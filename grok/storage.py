"""Files on this machine or at gs://: listed, opened, read by range, written atomically, copied.
Models on the Hugging Face hub, hf://ORG/NAME, are listed and read likewise, and not written.

Every failure is an OSError, or, in functions that read, the given class of GrokError, such as
CheckpointError, with the sentence "PATH: cannot be read: REASON"."""

import contextlib
import functools
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from grok import byte_ranges, hub
from grok.errors import GrokError

StrPath = str | os.PathLike[str]
# Bytes to fetch at a time of a remote file of which only the header is read.
HEADER_BLOCK = 1 << 16
CONNECTIONS = 32

# Else the client would first request each bucket's layout by gRPC, for minutes without an answer.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


def is_remote(path: StrPath) -> bool:
    """Returns True for a URL such as gs://bucket/folder."""
    return "://" in os.fspath(path)


def join(path: StrPath, *names: str) -> str:
    """The path of `names`, one inside the other, in the folder `path`."""
    return "/".join([os.fspath(path).rstrip("/"), *names])


def exists(path: StrPath, error: type[Exception] = OSError) -> bool:
    """Returns True where there is a file or folder at `path`."""
    with errors(path, error):
        if not is_remote(path):
            return Path(path).exists()
        if hub.is_hub(path):
            return hub.exists(path)
        system, inside = remote(path)
        return system.exists(inside)


def list_files(folder: StrPath, error: type[Exception] = OSError) -> dict[str, int | None]:
    """Sizes in bytes of the files in a folder by name, and None for each folder in it."""
    with errors(folder, error):
        if not is_remote(folder):
            with os.scandir(folder) as entries:
                return {entry.name: _size(entry) for entry in entries}
        if hub.is_hub(folder):
            return hub.list_files(folder)
        system, inside = remote(folder)
        objects = {entry["name"]: entry for entry in system.ls(inside, detail=True)}
        if list(objects) == [inside.rstrip("/")]:
            raise NotADirectoryError("Not a directory")
    return {
        name.rstrip("/").rpartition("/")[2]: None if entry["type"] == "directory" else entry["size"]
        for name, entry in objects.items()
        # Consoles mark a folder by an empty object of its name.
        if name.rstrip("/") != inside.rstrip("/")
    }


def list_tree(folder: StrPath) -> dict[str, int]:
    """Sizes in bytes of all files below a folder, by their path in it."""
    if not is_remote(folder):
        root = Path(folder)
        files = (path for path in root.rglob("*") if path.is_file())
        return {path.relative_to(root).as_posix(): path.stat().st_size for path in files}
    with errors(folder):
        system, inside = remote(folder)
        prefix = f"{inside.rstrip('/')}/"
        return {
            name.removeprefix(prefix): entry["size"]
            for name, entry in system.find(inside, detail=True).items()
            if name.startswith(prefix) and not name.endswith("/")
        }


@contextlib.contextmanager
def open_file(
    path: StrPath, error: type[Exception] = OSError, block_size: int | None = None
) -> Iterator[BinaryIO]:
    """Opens a file for reading, a remote one `block_size` bytes at a time; `error` is also for what
    fails inside the `with`. It must then be a regular file: a pipe would wait for its writer."""
    with errors(path, error):
        path = _local(path)
        if is_remote(path):
            system, inside = remote(path)
            with system.open(inside, "rb", block_size=block_size, cache_type="readahead") as file:
                yield file
            return
        if error is not OSError and not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("Not a regular file")
        with open(path, "rb") as file:
            yield file


def read_bytes(path: StrPath, error: type[Exception] = OSError) -> bytes:
    """The content of a small file."""
    with open_file(path, error) as file:
        return file.read()


def read_ranges(
    path: StrPath, starts: Sequence[int], out: memoryview, error: type[Exception] = OSError
) -> None:
    """Fills `out` with byte ranges of one length of a file, which begin at `starts`, in order. Of a
    remote file short gaps between them are read, too, and long ranges in several requests."""
    length = len(out) // len(starts)
    rows = [out[row * length : (row + 1) * length] for row in range(len(starts))]
    with errors(path, error):
        path = _local(path)
        if is_remote(path):
            _read_remote_ranges(path, starts, length, rows)
            return
        with open(path, "rb", buffering=0) as file:
            for row, start in zip(rows, starts, strict=True):
                byte_ranges.read_exactly(file.fileno(), row, start)


def _read_remote_ranges(
    path: StrPath, starts: Sequence[int], length: int, rows: Sequence[memoryview]
) -> None:
    system, inside = remote(path)
    begins, ends = map(list, zip(*byte_ranges.requests(starts, length), strict=True))
    answers = system.cat_ranges([inside] * len(begins), begins, ends, on_error="raise")
    index = 0
    for begin, end, data in zip(begins, ends, answers, strict=True):
        if len(data) != end - begin:
            raise OSError(byte_ranges.TRUNCATED)
        while index < len(starts) and starts[index] < end:
            start, stop = starts[index], starts[index] + length
            first, last = max(start, begin), min(stop, end)
            rows[index][first - start : last - start] = data[first - begin : last - begin]
            if stop > end:
                break  # the next answer has the rest
            index += 1


def prefetch(folder: StrPath, names: Sequence[str], error: type[Exception] = OSError) -> None:
    """Downloads files of a folder on the hub, several at a time; does nothing for other folders,
    which are read where they are."""
    if hub.is_hub(folder):
        with errors(folder, error):
            hub.download(folder, names)


def pinned(path: str, error: type[Exception] = OSError) -> str:
    """A name on the hub with its present commit as revision; any other path as it is."""
    with errors(path, error):
        return hub.pinned(path)


def _local(path: StrPath) -> StrPath:
    """The copy in the hub's cache of a file there; any other path as it is."""
    return hub.fetch(path) if hub.is_hub(path) else path


def write_bytes(path: StrPath, data: bytes) -> None:
    """Writes a small file atomically, and makes its folders; several processes may write it."""
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
    """Copies a small file, from and to a local path or gs://, atomically."""
    write_bytes(target, read_bytes(source))


def move(source: StrPath, target: StrPath) -> None:
    """Renames a folder, both paths local (then atomically) or both at gs://, to a new `target`."""
    if not is_remote(source):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        os.rename(source, target)
        return
    with errors(source):
        system, inside = remote(source)
        # The client's own `mv` uses a request that emulators lack.
        for name in list_tree(source):
            system.cp_file(f"{inside}/{name}", f"{remote(target)[1]}/{name}")
    remove(source)


def remove(path: StrPath) -> None:
    """Deletes a file, or a folder and all in it."""
    if is_remote(path):
        with errors(path):
            system, inside = remote(path)
            names = [name for name in system.find(inside) if f"{name}/".startswith(f"{inside}/")]
            # One by one: for the client's `rm` a name with brackets or a star is a pattern.
            with ThreadPoolExecutor(CONNECTIONS) as pool:
                list(pool.map(system.rm_file, names or [inside]))
    elif Path(path).is_dir():
        shutil.rmtree(path)
    else:
        os.remove(path)


def remote(path: StrPath) -> tuple[Any, str]:
    """The file system of a URL, an `fsspec` one, and the path in it."""
    url = os.fspath(path)
    if hub.is_hub(path):
        right = "`grok export hf SRC DST --push ORG/NAME` writes there"
        raise OSError(f"models on the hub are only read; {right}")
    if not url.startswith("gs://"):
        raise OSError("it is neither on this machine nor at gs://")
    return google_storage("STORAGE_EMULATOR_HOST" in os.environ), url.removeprefix("gs://")


@functools.cache
def google_storage(emulated: bool) -> Any:
    """The client of gs://, or of an emulator that the environment names."""
    from gcsfs.core import GCSFileSystem  # type: ignore[import-untyped]  # it takes a second

    # It logs each refusal with a stack trace, and raises it as well.
    logging.getLogger("gcsfs").addHandler(logging.NullHandler())
    return GCSFileSystem(**_options(emulated))


def configure_clients(folder: StrPath) -> None:
    """Configures the clients of gs:// that libraries create, where `folder` is there."""
    if is_remote(folder):
        import fsspec.config

        remote(folder)
        fsspec.config.conf.setdefault("gcs", {}).update(
            _options("STORAGE_EMULATOR_HOST" in os.environ)
        )


def _options(emulated: bool) -> dict[str, Any]:
    # An emulator has no accounts, and looking for one would ask Google's servers. Listings are not
    # cached, since others write there.
    return {"token": "anon" if emulated else None, "use_listings_cache": False}


@contextlib.contextmanager
def errors(
    path: StrPath, error: type[Exception] = OSError, problem: str = "cannot be read"
) -> Iterator[None]:
    """Turns failures of files at `path`, also of remote storage's clients, into OSError; or into
    `error`, a class of GrokError, with the sentence "PATH: PROBLEM: REASON."
    """
    try:
        yield
    except GrokError:
        raise
    except Exception as cause:
        # Exceptions of these clients (HTTP, accounts, retries) have no class in common.
        if not isinstance(cause, OSError) and not is_remote(path):
            raise
        if error is not OSError:
            raise error(f"{path}: {problem}: {reason(cause)}.") from cause
        if isinstance(cause, OSError):
            raise
        raise OSError(reason(cause)) from cause


def reason(error: Exception) -> str:
    """The cause of an OSError in a few words, without the path."""
    if isinstance(error, FileNotFoundError):
        return "No such file or directory"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _size(entry: os.DirEntry[str]) -> int | None:
    try:
        return None if entry.is_dir() else entry.stat().st_size
    except OSError:
        # A broken link: opening it raises.
        return entry.stat(follow_symlinks=False).st_size
