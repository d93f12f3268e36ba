"""The manifest of a dataset: hashes of its sources, its settings, its counts and its files.

It has neither times nor names of machines: the same input gives the same bytes.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grok import storage
from grok.data.dataset import FORMAT, LENGTHS_FILE, MANIFEST_FILE, read_manifest
from grok.data.prepare.formats import SourceFile
from grok.data.prepare.shards import COUNTS, ShardEntry, ShardJournal, file_hash

SOURCES_FILE = "sources.jsonl"
REJECTED_FILE = "rejected.jsonl"
TOKENIZER_FILE = "tokenizer.model"


def describe_sources(
    names: Sequence[str], files: Sequence[SourceFile], licence: str | None
) -> list[dict[str, Any]]:
    """Each source with its SHA-256: of a file, or of a folder's lines in SOURCES_FILE."""
    sources = []
    for number, name in enumerate(names):
        members = [file for file in files if file.source == number]
        is_file = len(members) == 1 and members[0].name == name
        lines_hash = hashlib.sha256(sources_lines(members)).hexdigest()
        sources.append(
            {
                "name": name,
                "sha256": members[0].sha256 if is_file else lines_hash,
                "files": len(members),
                "file_bytes": sum(file.bytes for file in members),
            }
        )
        if licence is not None:
            sources[-1]["licence"] = licence
    return sources


def write_dataset(
    folder: Path,
    journal: ShardJournal,
    identity: Mapping[str, Any],
    files: Sequence[SourceFile],
    model: bytes,
) -> dict[str, Any]:
    """Completes the dataset of a journal with all input; returns its manifest.

    After an interruption it can be called again: the manifest is written last.
    """
    entries = journal.entries
    names = [
        f"shard-{number:05}-of-{len(entries):05}.arrayrecord" for number in range(len(entries))
    ]
    for number, name in enumerate(names):
        if (path := journal.shard_path(number)).exists():
            os.replace(path, folder / name)
    lengths = io.BytesIO()
    np.save(lengths, np.concatenate([np.array(entry.lengths, np.uint32) for entry in entries]))
    contents = {
        LENGTHS_FILE: lengths.getvalue(),
        SOURCES_FILE: sources_lines(files),
        TOKENIZER_FILE: model,
    }
    if rejected := rejected_lines(entries):
        contents[REJECTED_FILE] = rejected
    for name, data in contents.items():
        storage.write_bytes(folder / name, data)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    manifest = _make_manifest(identity, entries, names, hashes)
    storage.write_bytes(folder / MANIFEST_FILE, (json.dumps(manifest, indent=2) + "\n").encode())
    journal.remove()
    return manifest


def _make_manifest(
    identity: Mapping[str, Any],
    entries: Sequence[ShardEntry],
    names: Sequence[str],
    hashes: Mapping[str, str],
) -> dict[str, Any]:
    """The manifest of shards of these `names` and other files of these `hashes`."""
    return {
        "format": FORMAT,
        **identity,
        "sources": [
            {**source, "counts": add_counts([entry.counts.get(number, {}) for entry in entries])}
            for number, source in enumerate(identity["sources"])
        ],
        "counts": add_counts([counts for entry in entries for counts in entry.counts.values()]),
        "shards": [
            {
                "name": name,
                "sha256": entry.sha256,
                "bytes": entry.bytes,
                "documents": len(entry.lengths),
                "tokens": sum(entry.lengths),
            }
            for name, entry in zip(names, entries, strict=True)
        ],
        "files": dict(hashes),
    }


def verify_dataset(folder: str | Path) -> list[str]:
    """A sentence for each file that differs from the manifest of the dataset in `folder`."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    hashes = {shard["name"]: shard["sha256"] for shard in manifest["shards"]} | manifest["files"]
    problems = []
    for name, sha256 in hashes.items():
        if not (folder / name).exists():
            problems.append(f"{name} is missing.")
        elif (actual := file_hash(folder / name)[0]) != sha256:
            problems.append(
                f"{name} does not match its manifest: its SHA-256 is {actual}, not {sha256}."
            )
    return problems


def add_counts(several: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sums of several counts."""
    total = dict.fromkeys(COUNTS, 0)
    for counts in several:
        for name, number in counts.items():
            total[name] += number
    return total


def rejected_lines(entries: Iterable[ShardEntry]) -> bytes:
    """Lines of REJECTED_FILE: file, line and reason of each bad record."""
    return _lines(line for entry in entries for line in entry.rejected)


def sources_lines(files: Iterable[SourceFile]) -> bytes:
    """Lines of SOURCES_FILE: name, bytes and SHA-256 of each file that was read."""
    return _lines(
        {"source": file.source, "file": file.name, "bytes": file.bytes, "sha256": file.sha256}
        for file in files
    )


def _lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    # A file's name may have bytes that are not UTF-8; json.dumps escapes them.
    return "".join(json.dumps(record) + "\n" for record in records).encode()
