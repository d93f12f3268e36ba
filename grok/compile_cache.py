"""Cache of compiled programs in a folder that all processes of a run share, local or at gs://.
JAX's own cache is of one machine, and process 0 alone writes it; here every process copies the
folder's programs to its own disk when it starts, and uploads what it had to compile.

A program is executed as it was stored: whoever writes to the folder runs code here."""

import atexit
import fcntl
import hashlib
import itertools
import queue
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import jax
from jax._src import compilation_cache

# JAX writes its cache in process 0 alone, and has no public way to change that.
from jax._src import compiler as jax_compiler

from grok import storage
from grok.distributed import is_primary, process_count, process_index
from grok.hardware import user_cache

FOLDER = "compiled"  # beside a run's output
SUFFIX = "-cache"  # of the files that JAX writes
CONNECTIONS = 8
EXIT_SECONDS = 60  # for what was compiled last to arrive in the folder


def folder_for(setting: str, output: str) -> str:
    """The shared folder of a job: the config's `setting`, else beside an `output` that is at gs://
    or that several processes write to; empty where the user's folder is enough."""
    is_shared = storage.is_remote(output) or process_count() > 1
    return setting or (storage.join(output, FOLDER) if output and is_shared else "")


def share(folder: str, log: Callable[[str], object] | None = None) -> "SharedPrograms | None":
    """Compiles for `folder`, too, from now on; does nothing where it is empty. Call it in every
    process, when the number of processes is known and before JAX compiles. Where the folder cannot
    be used, `log` (default: stderr) gets a sentence, and programs are compiled as without it."""
    if not folder:
        return None
    log = log or _print
    try:
        programs = SharedPrograms(folder, log)
    except OSError as error:
        log(f"{folder} (compiled programs) cannot be copied to this machine: {error}")
        return None
    programs.fetch()
    programs.install()
    return programs


class SharedPrograms:
    """A shared folder, and this process's copy of it, which JAX reads and writes."""

    def __init__(self, folder: str, log: Callable[[str], object]):
        self.folder, self._log = folder, log
        name = hashlib.sha256(folder.encode()).hexdigest()[:16]
        self.local, self._lock = _claim(user_cache() / "shared" / name)
        self.compiled = 0  # programs that were not in the folder
        self._finished: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send_all, daemon=True)

    def fetch(self) -> None:
        """Makes the copy equal to the folder, except for what was not stored there."""
        try:
            for unfinished in self.local.glob(".*.unfinished"):
                unfinished.unlink()  # of a process that was killed
            stored = self._list()
            for file in self.local.glob(f"*{SUFFIX}"):
                # It may be of another version of the folder, or unfinished.
                if stored.get(file.name) == file.stat().st_size:
                    del stored[file.name]
                else:
                    file.unlink()
            with ThreadPoolExecutor(CONNECTIONS) as pool:
                list(pool.map(self._fetch_one, stored))
            if is_primary() and (count := len(list(self.local.glob(f"*{SUFFIX}")))):
                self._log(f"{count} compiled programs from {self.folder}")
        except OSError as error:
            self._report("cannot be read", error)

    def install(self) -> None:
        """Makes JAX use the copy, and store there, and then in the folder, what it compiles."""
        compilation_cache.reset_cache()  # or what was compiled before would have settled its folder
        jax.config.update("jax_compilation_cache_dir", str(self.local))
        # The many short ones take long together.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax_compiler._compile_and_write_cache = self._storing(jax_compiler._compile_and_write_cache)
        self._sender.start()
        atexit.register(self.close)

    def close(self) -> None:
        """Waits, for a limited time, until all that was compiled is in the folder."""
        self._finished.put(None)
        self._sender.join(EXIT_SECONDS)

    def _storing(self, compile_and_write: Callable[..., Any]) -> Callable[..., Any]:
        """JAX's function that compiles a program and stores it in process 0, as one that stores in
        every process what process 0 does not: programs of this process's own devices, and, on CPU,
        all, since there each process has its own key for the same program."""

        def compile_and_store(backend: Any, computation: Any, devices: Any, *rest: Any) -> Any:
            *_, name, key = rest
            # It is here for lack of a copy, or since the copy cannot be used.
            (self.local / f"{key}{SUFFIX}").unlink(missing_ok=True)
            executable = compile_and_write(backend, computation, devices, *rest)
            self.compiled += 1
            if process_index() and (devices.is_fully_addressable or backend.platform == "cpu"):
                try:
                    compilation_cache.put_executable_and_time(key, name, executable, backend, 0)
                except (OSError, jax.errors.JaxRuntimeError) as error:
                    self._report(f"has no {name}", error)
            self._finished.put(f"{key}{SUFFIX}")
            return executable

        return compile_and_store

    def _list(self) -> dict[str, int]:
        if not storage.exists(self.folder):
            return {}
        files = storage.list_files(self.folder).items()
        return {name: size for name, size in files if size and name.endswith(SUFFIX)}

    def _fetch_one(self, name: str) -> None:
        storage.copy(storage.join(self.folder, name), self.local / name)

    def _send_all(self) -> None:
        while name := self._finished.get():
            file = self.local / name
            try:
                if file.exists():
                    storage.copy(file, storage.join(self.folder, name))
            except OSError as error:
                self._report("cannot be written", error)
                return

    def _report(self, problem: str, error: Exception) -> None:
        self._log(f"{self.folder} (compiled programs) {problem}: {storage.reason(error)}")


def _claim(base: Path) -> tuple[Path, IO[str]]:
    """A folder in `base` that no other process on this machine uses, and the lock that says so."""
    for number in itertools.count():
        path = base / str(number)
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
        except OSError:
            lock.close()
            raise
        else:
            return path, lock
    raise AssertionError


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
