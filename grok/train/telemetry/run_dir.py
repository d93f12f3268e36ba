"""The folder of a run, here or at gs://, for files that grow while the run goes on."""

import contextlib
import tempfile
from pathlib import Path

from grok import storage
from grok.errors import CheckpointError

# What a run that goes on appends to.
GROWING = ("metrics.jsonl", "events.jsonl")


class RunDir:
    """Where a process writes what belongs into a run's folder: `path`, the folder itself.

    Nothing can be appended to at gs://, so there `path` is a temporary folder: it begins with what
    is at gs://, and `upload` copies what has changed in it. Once entered, leaving it uploads.
    """

    def __init__(self, folder: str):
        self._folder = folder
        self._uploaded: dict[str, int] = {}  # bytes, by name
        self._temporary = tempfile.TemporaryDirectory() if storage.is_remote(folder) else None
        self.path = Path(self._temporary.name if self._temporary else folder)

    def __enter__(self) -> "RunDir":
        """Raises CheckpointError where the folder cannot be read."""
        if self._temporary:
            try:
                for name in GROWING:
                    if storage.exists(storage.join(self._folder, name)):
                        storage.copy(storage.join(self._folder, name), self.path / name)
            except OSError as error:
                raise CheckpointError(
                    f"{self._folder}: cannot be read: {storage.reason(error)}."
                ) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._temporary:
            # What ended the run may be the same.
            with contextlib.suppress(OSError):
                self.upload()
            self._temporary.cleanup()

    def upload(self) -> None:
        """Copies to gs:// what is there in another size than before. Raises OSError."""
        if not self._temporary:
            return
        for name, size in storage.list_tree(self.path).items():
            if self._uploaded.get(name) != size:
                storage.copy(self.path / name, storage.join(self._folder, name))
                self._uploaded[name] = size


def write_file(folder: str, name: str, data: bytes) -> None:
    """Writes a file of a run's folder whole. Raises CheckpointError where it cannot be written."""
    try:
        storage.write_bytes(storage.join(folder, name), data)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: {name} cannot be written: {storage.reason(error)}."
        ) from error
