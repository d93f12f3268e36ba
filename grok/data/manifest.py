"""The manifest of a token dataset, `manifest.json`, and what it must hold to be read."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from grok import storage
from grok.errors import DataError

MANIFEST_FILE = "manifest.json"
FORMAT = "grok documents 1"
# Of a file beside the manifest.
NAME = re.compile(r"(?!\.+$)[\w.-]+")
SHA256 = re.compile(r"[0-9a-f]{64}")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a dataset; DataError when `folder` has none that can be read, or whose values
    are of no kind that `grok data prepare` writes."""
    path = storage.join(folder, MANIFEST_FILE)
    if not storage.exists(path, DataError):
        finished = "a folder that `grok data prepare` finished"
        raise DataError(f"{folder} has no {MANIFEST_FILE}; {finished} would work.")
    try:
        manifest = json.loads(storage.read_bytes(path, DataError))
    except (ValueError, RecursionError) as error:
        raise DataError(f"manifest {path} is not JSON ({error}).") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path} is no manifest of `{FORMAT}`, the format that is read here.")
    for key, value, is_right in _values(manifest):
        if not is_right(value):
            right = "the folder as `grok data prepare` wrote it"
            raise DataError(f"manifest {path}: {key} is {value!r:.100}; {right} would work.")
    documents = sum(shard["documents"] for shard in manifest["shards"])
    if documents != manifest["counts"]["documents"]:
        problem = f"{documents} documents in its shards and {manifest['counts']['documents']} in"
        raise DataError(f"manifest {path}: has {problem} counts.documents; one of them is wrong.")
    return manifest


def _values(manifest: dict[str, Any]) -> Iterator[tuple[str, Any, Callable[[Any], bool]]]:
    """Yields the key and value of what is read, and what the value must be. A value within another
    follows when the outer one was right."""
    for key in ("counts", "files", "tokenizer"):
        yield key, manifest.get(key), _is_object
    for key in ("shards", "sources"):
        yield key, manifest.get(key), _is_list
    for name, value in manifest["counts"].items():
        yield f"counts.{name}", value, _is_count
    for name in ("documents", "tokens", "loss_tokens"):
        yield f"counts.{name}", manifest["counts"].get(name), _is_count
    for name, value in manifest["files"].items():
        yield "the name of a file", name, _is_name
        yield f"files.{name}", value, _is_sha256
    for number, shard in enumerate(manifest["shards"]):
        key = f"shards[{number}]"
        yield key, shard, _is_object
        yield f"{key}.name", shard.get("name"), _is_name
        yield f"{key}.sha256", shard.get("sha256"), _is_sha256
        for name in ("bytes", "documents", "tokens"):
            yield f"{key}.{name}", shard.get(name), _is_count
    for number, source in enumerate(manifest["sources"]):
        yield f"sources[{number}]", source, _is_object
        yield f"sources[{number}].counts", source.get("counts"), _is_object
    tokenizer = manifest["tokenizer"]
    yield "tokenizer.sha256", tokenizer.get("sha256"), _is_sha256
    yield "tokenizer.vocab_size", tokenizer.get("vocab_size"), _is_count


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(NAME.fullmatch(value))


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and bool(SHA256.fullmatch(value))
