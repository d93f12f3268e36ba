"""The list of a checkpoint's files, `files.json`: its step, and size and checksum of each file. A
save writes it when all others are there, but for the mark that commits it. The chunks of arrays
have checksums of their own in their files (`grok.weights.orbax.zarr`), which reading them checks.
"""

import dataclasses
import json
import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xxhash

from grok import storage
from grok.errors import CheckpointError
from grok.storage import StrPath, join
from grok.weights.checksums import ALGORITHM
from grok.weights.source import parse_object

FILES = "files.json"
VERSION = 1
# The last file of a checkpoint, for Orbax, and its content.
COMMITTED, COMMITTED_BYTES = "commit_success.txt", b"Checkpoint commit was successful"
# Folder of chunks, and of nothing else, in OCDBT; the end of a name of a file of chunks in zarr 3.
VALUES = "values"
CHUNKS = re.compile(rf"/{VALUES}/|/c(\.\d+)*$")
# Part of the name of a local checkpoint that Orbax is writing.
UNFINISHED = ".orbax-checkpoint-tmp"
READERS = 16  # threads


@dataclasses.dataclass(frozen=True)
class FileList:
    """The content of `files.json`: sizes in bytes of all files, checksums of those without
    chunks."""

    step: int
    sizes: dict[str, int]
    checksums: dict[str, str]


class Damage(Exception):
    """The damage of a checkpoint in a few words, such as "lacks the file model/_METADATA"."""


def commit(folder: StrPath, step: int) -> None:
    """Writes the list of the files in `folder`, and then the mark of a finished checkpoint. Raises
    OSError where they cannot be written."""
    sizes = storage.list_tree(folder)
    names = sorted(name for name in sizes if name not in (FILES, COMMITTED))
    checksums = _checksums(folder, [name for name in names if not CHUNKS.search(name)])
    entries: dict[str, dict[str, Any]] = {FILES: {"version": VERSION, "step": step}}
    for name in names:
        checksum = {ALGORITHM: checksums[name]} if name in checksums else {}
        entries[name] = {"bytes": sizes[name], **checksum}
    entries[FILES][ALGORITHM] = _own_checksum(entries)
    storage.write_bytes(join(folder, FILES), json.dumps(entries, indent=1).encode())
    storage.write_bytes(join(folder, COMMITTED), COMMITTED_BYTES)


def find_damage(folder: StrPath, ignored: Collection[str] = ()) -> str | None:
    """Describes the damage of the checkpoint in `folder` in a few words; None where it has none.
    The items `ignored`, such as "optimizer", are not looked at, and no chunks of arrays are read.
    Raises OSError where `folder` cannot be read, which is no damage, and CheckpointError for a
    checkpoint of an earlier version of grok."""
    try:
        files, present = _read_list(folder)
        _check_files(folder, files, present, ignored)
    except Damage as damage:
        return str(damage)
    return None


def check_files(folder: str, ignored: Collection[str] = ()) -> None:
    """Raises CheckpointError where `find_damage` finds some, or `folder` cannot be read."""
    with storage.errors(folder, CheckpointError):
        problem = find_damage(folder, ignored)
    if problem is not None:
        raise CheckpointError(f"{folder}: {problem}.")


def read_step(folder: StrPath) -> int:
    """The step of the checkpoint in `folder`. Raises CheckpointError where its list is damaged."""
    with storage.errors(folder, CheckpointError):
        try:
            return _read_list(folder)[0].step
        except Damage as damage:
            raise CheckpointError(f"{folder}: {damage}.") from damage


def is_unfinished(folder: str) -> bool:
    """Returns True for a save that was cut off. Raises OSError where `folder` cannot be read."""
    name = folder.rpartition("/")[2]
    if not storage.is_remote(folder):
        return UNFINISHED in name
    # Buckets cannot rename, so a save there is finished by files of its own.
    return name.isdecimal() and not any(
        storage.exists(join(folder, last)) for last in (COMMITTED, FILES)
    )


def _read_list(folder: StrPath) -> tuple[FileList, dict[str, int]]:
    """The list in `folder`, and the sizes of the files that are there."""
    present = storage.list_tree(folder)
    if not present:
        raise Damage("is empty")
    if FILES not in present:
        raise Damage(
            f"lacks the file {FILES}, which a save writes last: it is damaged, or was saved by an "
            "earlier version of grok"
        )
    data = storage.read_bytes(join(folder, FILES))
    try:
        return _parse_list(data), present
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise Damage(f"has no readable {FILES}") from error
    except _OtherVersion as error:
        raise CheckpointError(
            f"{folder}: was saved by another version of grok{error}; it cannot be read by this "
            "one, and a new run or import in another folder would work."
        ) from error


class _OtherVersion(Exception):
    """A list of another version: what is to be said about it."""


def _parse_list(data: bytes) -> FileList:
    entries = parse_object(data, FILES)
    if FILES not in entries and not any("version" in entry for entry in entries.values()):
        raise _OtherVersion(", without checksums of its arrays")
    own = entries[FILES]
    checksum = own.pop(ALGORITHM)
    if checksum != _own_checksum(entries):
        raise Damage(f"has other bytes in {FILES} than were saved")
    del entries[FILES]
    if own["version"] != VERSION:
        raise _OtherVersion(f", with version {own['version']} of {FILES}")
    sizes = {name: entry["bytes"] for name, entry in entries.items()}
    checksums = {n: entry[ALGORITHM] for n, entry in entries.items() if ALGORITHM in entry}
    return FileList(int(own["step"]), sizes, checksums)


def _check_files(
    folder: StrPath, files: FileList, present: dict[str, int], ignored: Collection[str]
) -> None:
    name = str(folder).rstrip("/").rpartition("/")[2]
    if name.isdecimal() and int(name) != files.step:
        raise Damage(f"is the checkpoint of step {files.step} under another name")
    if COMMITTED not in present:
        raise Damage(f"lacks the file {COMMITTED}")
    if storage.read_bytes(join(folder, COMMITTED)) != COMMITTED_BYTES:
        raise Damage(f"has other bytes in {COMMITTED} than were saved")
    sizes = {n: size for n, size in files.sizes.items() if n.partition("/")[0] not in ignored}
    for name, size in sizes.items():
        if name not in present:
            raise Damage(f"lacks the file {name}")
        if present[name] != size:
            problem = f"{present[name]:,} bytes in {name}, which was saved with {size:,}"
            raise Damage(f"has {problem}")
    saved = {name: files.checksums[name] for name in sizes if name in files.checksums}
    for name, checksum in _checksums(folder, list(saved)).items():
        if checksum != saved[name]:
            raise Damage(f"has other bytes in {name} than were saved")


def _checksums(folder: StrPath, names: list[str]) -> dict[str, str]:
    """The checksums of whole files by name."""

    def checksum(name: str) -> str:
        return xxhash.xxh3_128_hexdigest(storage.read_bytes(join(folder, name)))

    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip(names, pool.map(checksum, names), strict=True))


def _own_checksum(entries: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(entries).encode())
