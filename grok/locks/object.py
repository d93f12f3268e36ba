"""A lock by an object at gs://. Requests with a precondition on the object's generation create,
renew and delete it, so of two processes one gets it. Its owner renews it; one that is dead, or that
was silent for a while by the clock of the storage, loses it to whoever asks next."""

import contextlib
import datetime
import email.utils
import json
import threading
from collections.abc import Callable
from typing import NamedTuple

from grok import storage
from grok.locks.owner import Owner

RENEW_SECONDS = 15
SILENT_SECONDS = 60  # after which the owner on another machine is taken for dead
ATTEMPTS = 3  # to take a lock that changes meanwhile
RELEASE_SECONDS = 10
THREAD_NAME = "grok-lock"


class _State(NamedTuple):
    """A lock as it stands in the storage: its owner, the seconds since it was renewed, and the
    generation that a request to replace it has to name."""

    owner: Owner
    silent_seconds: float
    generation: str

    @property
    def is_free(self) -> bool:
        """True where its owner has gone: another may take it over."""
        silent = self.silent_seconds > SILENT_SECONDS
        return self.owner.is_dead or (silent and not self.owner.lives_here)


class ObjectLock:
    """A lock by the object at the URL `path`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._owner = Owner()
        self._generation: str | None = None  # of our own lock
        self._released = threading.Event()
        self._renewing: threading.Thread | None = None

    def acquire(self, owner: Owner) -> Owner | None:
        """Takes the lock; returns the owner where another has it."""
        self._owner = owner
        state = None
        for _ in range(ATTEMPTS):
            state = self._read()
            if state is not None and state.owner.token == owner.token:
                # The answer to our request was lost, and the request was repeated.
                self._generation = state.generation
                return None
            if state is not None and not state.is_free:
                return state.owner
            with contextlib.suppress(FileExistsError):
                self._generation = self._write("0" if state is None else state.generation)
                return None
        return state.owner if state is not None else Owner()

    def owner(self) -> Owner | None:
        """The process that has the lock, None where none has."""
        state = self._read()
        return None if state is None or state.is_free else state.owner

    def keep(self, on_lost: Callable[[str], object]) -> None:
        """Renews the lock until it is released, or calls `on_lost` when another has taken it."""

        def renew_until_released() -> None:
            while not self._released.wait(RENEW_SECONDS):
                # An error may pass; the lock is ours until another process takes it.
                with contextlib.suppress(OSError):
                    if (owner := self.renew()) is not None:
                        folder = self.path.rpartition("/")[0]
                        on_lost(f"{folder}: another process took over ({owner}).")
                        return

        thread = threading.Thread(target=renew_until_released, name=THREAD_NAME, daemon=True)
        self._renewing = thread
        self._renewing.start()

    def renew(self) -> Owner | None:
        """Shows that the owner is alive; returns the new owner where another has the lock."""
        assert self._generation is not None
        try:
            self._generation = self._write(self._generation)
        except FileExistsError:
            return self.acquire(self._owner)
        return None

    def release(self) -> None:
        """Gives the lock up."""
        self._released.set()
        if self._renewing is not None:
            self._renewing.join(RELEASE_SECONDS)
        if self._generation is not None:
            with contextlib.suppress(OSError):
                self._call(
                    "DELETE", "b/{}/o/{}", *self._names(), ifGenerationMatch=self._generation
                )

    def _read(self) -> _State | None:
        with contextlib.suppress(FileNotFoundError), storage.errors(self.path):
            system, inside = storage.remote(self.path)
            headers, content = self._call("GET", "b/{}/o/{}", *self._names())
            entry = json.loads(content)
            now = email.utils.parsedate_to_datetime(headers["Date"])
            silent = now - datetime.datetime.fromisoformat(entry["updated"])
            # Whoever replaced it meanwhile has another generation.
            owner = Owner.from_bytes(system.cat_file(inside))
            return _State(owner, silent.total_seconds(), entry["generation"])
        return None

    def _write(self, generation: str) -> str:
        """Writes the lock over that of a generation, 0: none; returns its own. Raises
        FileExistsError where the present one is another."""
        system, _ = storage.remote(self.path)
        bucket, key = self._names()
        _, content = self._call(
            "POST",
            f"{system._location}/upload/storage/v1/b/{{}}/o",
            bucket,
            name=key,
            uploadType="media",
            ifGenerationMatch=generation,
            headers={"Content-Type": "application/octet-stream"},
            data=self._owner.to_bytes(),
        )
        return json.loads(content)["generation"]

    def _names(self) -> tuple[str, str]:
        bucket, _, key = storage.remote(self.path)[1].partition("/")
        return bucket, key

    def _call(self, method: str, url: str, *names: str, **options) -> tuple[dict, bytes]:
        system, _ = storage.remote(self.path)
        with storage.errors(self.path):
            return system.call(method, url, *names, **options)
