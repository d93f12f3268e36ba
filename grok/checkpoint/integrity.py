"""Whether a checkpoint is as it was saved, told from the sizes of its files and its small files.

A list of the files, `files.json`, is the last that a save adds to them. Small ones have their
checksum in it, so that no bit of what describes the arrays can turn unnoticed; of large ones the
sizes are compared, which costs no reading.
"""

import json
from typing import Any

import xxhash

from grok import storage
from grok.storage import StrPath, join
from grok.weights.checksums import ALGORITHM
from grok.weights.orbax.metadata import COMMITTED

FILES = "files.json"
# Up to so many bytes a file is compared by its content.
SMALL = 1 << 20
# In the name of a local checkpoint that Orbax is writing.
UNFINISHED = ".orbax-checkpoint-tmp"
# Orbax writes the time into it when the checkpoint appears.
STEP_METADATA = "_CHECKPOINT_METADATA"
# What describes a checkpoint, for those without a list.
METADATA = ("meta/metadata", "model/_METADATA")


def write_list(folder: StrPath) -> None:
    """Lists the files in `folder`. Raises OSError where it cannot be written."""
    files = {
        name: {"bytes": size} | ({ALGORITHM: _checksum(folder, name)} if size <= SMALL else {})
        for name, size in sorted(storage.list_tree(folder).items())
        if name != STEP_METADATA
    }
    storage.write_bytes(join(folder, FILES), json.dumps(files).encode())


def damage(folder: StrPath) -> str | None:
    """What is wrong with the checkpoint in `folder`, in a few words; None where nothing is.

    Raises OSError where it cannot be read, which says nothing of what it holds.
    """
    present = storage.list_tree(folder)
    if not present:
        return "is empty"
    if storage.is_remote(folder) and COMMITTED not in present:
        return f"lacks the file {COMMITTED}"
    for name in (STEP_METADATA, *([FILES] if FILES in present else METADATA)):
        if name not in present or not (found := _object(folder, name)):
            return f"has no readable {name}"
    if FILES not in present:
        return None
    try:
        problems = (_difference(folder, present, name, was) for name, was in found.items())
        return next((problem for problem in problems if problem), None)
    except (KeyError, TypeError, ValueError):
        return f"has no readable {FILES}"


def is_unfinished(folder: str) -> bool:
    """Whether a save into `folder` was cut off. Raises OSError where it cannot be read."""
    name = folder.rpartition("/")[2]
    if not storage.is_remote(folder):
        return UNFINISHED in name
    # Nothing can be renamed there, so a save is finished by a file of its own, after the list.
    return name.isdecimal() and not any(
        storage.exists(join(folder, last)) for last in (COMMITTED, FILES)
    )


def _difference(
    folder: StrPath, present: dict[str, int], name: str, was: dict[str, Any]
) -> str | None:
    """How the file `name` differs from what the list says it was."""
    if name not in present:
        return f"lacks the file {name}"
    if present[name] != was["bytes"]:
        return f"has {present[name]:,} bytes in {name}, which was saved with {was['bytes']:,}"
    if ALGORITHM in was and _checksum(folder, name) != was[ALGORITHM]:
        return f"has other bytes in {name} than were saved"
    return None


def _checksum(folder: StrPath, name: str) -> str:
    return xxhash.xxh3_128_hexdigest(storage.read_bytes(join(folder, name)))


def _object(folder: StrPath, name: str) -> dict[str, Any]:
    """The JSON object in a file; empty where it is none."""
    try:
        found = json.loads(storage.read_bytes(join(folder, name)))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
