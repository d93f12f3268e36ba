"""Which pieces an import has finished: a file of JSON lines that survives a kill at any moment."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from grok.errors import CheckpointError

# A tensor's name, and the layer, None where it has none.
Key = tuple[str, int | None]


class Journal:
    """The journal at `path`: its first line says of which weights, each further one of a piece.

    Opening it reads the finished pieces into `done`; a line that a kill cut short is dropped. One
    process at a time has it open. Raises CheckpointError where another process does, and where it
    is of other weights than `identity` says.
    """

    def __init__(self, path: Path, identity: dict[str, Any]):
        self._path = path
        self._file = path.open("a+b", buffering=0)
        try:
            self.done = self._read(identity)
        except BaseException:
            self.close()
            raise

    def add(self, key: Key, **facts: Any) -> None:
        """Notes a finished piece and what is known of it."""
        name, layer = key
        self._write({"name": name, "layer": layer, **facts})
        self.done[key] = facts

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _read(self, identity: dict[str, Any]) -> dict[Key, dict[str, Any]]:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{self._path.parent}: another import is writing here; wait for its end."
            ) from None
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            os.truncate(self._path, sum(map(len, lines[:-1])))
            lines.pop()
        if not lines:
            self._write(identity)
            return {}
        try:
            first, *rest = map(json.loads, lines)
            done = {(line.pop("name"), line.pop("layer")): line for line in rest}
        except (ValueError, KeyError, AttributeError):
            raise self._refusal("is not the journal of an import") from None
        wanted = json.loads(json.dumps(identity))
        differing = [
            key for key in wanted if not isinstance(first, dict) or first.get(key) != wanted[key]
        ]
        if differing:
            raise self._refusal(f"is of an import of other weights ({', '.join(differing)} differ)")
        return done

    def _refusal(self, problem: str) -> CheckpointError:
        return CheckpointError(
            f"{self._path}: {problem}; delete {self._path.parent} to begin anew, or name another "
            "folder."
        )

    def _write(self, line: dict[str, Any]) -> None:
        # In one call, and unbuffered: a kill leaves all of it or, at worst, a torn last line.
        self._file.write(json.dumps(line).encode() + b"\n")
