"""Detects damaged checkpoints, by the sizes of their files and the content of the small ones. A
save writes the list of its files, `files.json`, last, with checksums of the small ones."""

import contextlib
import json
from typing import Any

import xxhash

from grok import storage
from grok.errors import CheckpointError
from grok.storage import StrPath, join
from grok.weights.checksums import ALGORITHM
from grok.weights.orbax.metadata import COMMITTED
from grok.weights.source import parse_object

FILES = "files.json"
# Files of at most this many bytes are compared by checksum.
SMALL_BYTES = 1 << 20
# Part of the name of a local checkpoint that Orbax is writing.
UNFINISHED = ".orbax-checkpoint-tmp"
# Orbax writes the time into it when the checkpoint appears.
STEP_METADATA = "_CHECKPOINT_METADATA"
# Files that every checkpoint has, for those without a list.
METADATA = ("meta/metadata", "model/_METADATA")


def write_list(folder: StrPath) -> None:
    """Writes the list of the files in `folder`. Raises OSError where it cannot be written."""
    files: dict[str, dict[str, Any]] = {}
    for name, size in sorted(storage.list_tree(folder).items()):
        if name != STEP_METADATA:
            checksum = {ALGORITHM: _checksum(folder, name)} if size <= SMALL_BYTES else {}
            files[name] = {"bytes": size, **checksum}
    storage.write_bytes(join(folder, FILES), json.dumps(files).encode())


def find_damage(folder: StrPath) -> str | None:
    """Describes the damage of the checkpoint in `folder` in a few words; None where it has none.
    Raises OSError where `folder` cannot be read, which is no damage."""
    present = storage.list_tree(folder)
    if not present:
        return "is empty"
    if storage.is_remote(folder) and COMMITTED not in present:
        return f"lacks the file {COMMITTED}"
    for name in (STEP_METADATA, *([FILES] if FILES in present else METADATA)):
        content: dict[str, Any] = {}
        if name in present:
            with contextlib.suppress(CheckpointError):
                content = parse_object(storage.read_bytes(join(folder, name)), name)
        if not content:
            return f"has no readable {name}"
    if FILES not in present:
        return None
    try:
        problems = (_file_damage(folder, present, name, saved) for name, saved in content.items())
        return next((problem for problem in problems if problem), None)
    except (KeyError, TypeError, ValueError):
        return f"has no readable {FILES}"


def is_unfinished(folder: str) -> bool:
    """Returns True for a save that was cut off. Raises OSError where `folder` cannot be read."""
    name = folder.rpartition("/")[2]
    if not storage.is_remote(folder):
        return UNFINISHED in name
    # Buckets cannot rename, so a save there is finished by a file of its own, after the list.
    return name.isdecimal() and not any(
        storage.exists(join(folder, last)) for last in (COMMITTED, FILES)
    )


def _file_damage(
    folder: StrPath, present: dict[str, int], name: str, saved: dict[str, Any]
) -> str | None:
    """The difference between the file `name` and its entry in the list."""
    if name not in present:
        return f"lacks the file {name}"
    if present[name] != saved["bytes"]:
        return f"has {present[name]:,} bytes in {name}, which was saved with {saved['bytes']:,}"
    if ALGORITHM in saved and _checksum(folder, name) != saved[ALGORITHM]:
        return f"has other bytes in {name} than were saved"
    return None


def _checksum(folder: StrPath, name: str) -> str:
    return xxhash.xxh3_128_hexdigest(storage.read_bytes(join(folder, name)))
