"""The folder of a run, here or at gs://, for files that grow during the run."""

import contextlib
import tempfile
from pathlib import Path

from grok import storage
from grok.errors import CheckpointError

# Files that a resumed run appends to.
GROWING = ("metrics.jsonl", "events.jsonl")


class RunDir:
    """A local folder, `path`, for the files of a run's folder.

    It is the run's folder itself, or, since nothing can be appended to at gs://, a temporary one:
    entering downloads the files to append to, and `upload` and leaving copy back what has changed.
    """

    def __init__(self, folder: str):
        self._folder = folder
        self._uploaded: dict[str, int] = {}  # bytes, by name
        self._temporary = tempfile.TemporaryDirectory() if storage.is_remote(folder) else None
        self.path = Path(self._temporary.name if self._temporary else folder)

    def __enter__(self) -> "RunDir":
        """Raises CheckpointError if the folder cannot be read."""
        if self._temporary:
            with storage.errors(self._folder, CheckpointError):
                for name in GROWING:
                    if storage.exists(storage.join(self._folder, name)):
                        storage.copy(storage.join(self._folder, name), self.path / name)
        return self

    def __exit__(self, *_: object) -> None:
        if self._temporary:
            # The failure that ended the run may be the same.
            with contextlib.suppress(OSError):
                self.upload()
            self._temporary.cleanup()

    def upload(self) -> None:
        """Copies the files whose size has changed to gs://. Raises OSError."""
        if not self._temporary:
            return
        for name, size in storage.list_tree(self.path).items():
            if self._uploaded.get(name) != size:
                storage.copy(self.path / name, storage.join(self._folder, name))
                self._uploaded[name] = size


def write_file(folder: str, name: str, data: bytes) -> None:
    """Writes a file of a run's folder. Raises CheckpointError if it cannot."""
    with storage.errors(folder, CheckpointError, f"{name} cannot be written"):
        storage.write_bytes(storage.join(folder, name), data)
