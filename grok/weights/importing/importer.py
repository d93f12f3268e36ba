"""Any source of weights -> a checkpoint of ours, streamed, and resumable after a kill. An
unfinished import is in `.import`, with a journal; a rename to `checkpoints/0` finishes it."""

import dataclasses
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import xxhash

from grok import storage
from grok.config import RunConfig
from grok.config.load import from_dict, to_dict
from grok.config.text import to_yaml
from grok.errors import CheckpointError
from grok.locks.folder import hold_folder
from grok.model.params import num_parameters
from grok.resumable import Journal, check_destination, check_space, continuable
from grok.weights.array_difference import ArrayDifference
from grok.weights.cast import MeasuredQuantizedSource, converted
from grok.weights.checksums import ALGORITHM
from grok.weights.detect import open_source
from grok.weights.importing.streaming import Piece, all_arrays, all_pieces, stream
from grok.weights.orbax.metadata import MODEL, read_meta, write_files
from grok.weights.orbax.source import step_folder
from grok.weights.source import ByteCounter, OnProgress, Source, layer_pieces, no_progress

STAGING, JOURNAL = ".import", "journal.jsonl"
NO_FILES: Mapping[str, bytes] = {}


@dataclasses.dataclass(frozen=True)
class Imported:
    """A finished import: the checkpoint's folder, and the bytes and seconds that this call took.
    `summary` is stored in the checkpoint: facts of the source, `checksums` by tensor, lists of one
    per layer where it has layers, and `rounding_errors` of matrices that the import quantised."""

    checkpoint: Path
    written: int
    seconds: float
    summary: dict[str, Any]


def import_weights(
    source: Source,
    folder: str | os.PathLike[str],
    run: RunConfig,
    tokenizer: Mapping[str, bytes] = NO_FILES,
    on_progress: OnProgress = no_progress,
) -> Imported:
    """Makes `folder` that of a run, `run` with the source's model and type, whose checkpoint of
    step 0 holds the weights, and of `tokenizer`: its files by name, its own first. After an
    interruption the same call continues. Raises CheckpointError where `folder` is remote, holds
    anything else or cannot be written, where the interrupted import was of other weights, and for
    what `source` cannot read."""
    start = time.monotonic()
    path = Path(folder)
    model = dataclasses.replace(source.config, param_dtype=cast(Any, source.dtype))
    data = run.data
    if tokenizer:
        data = dataclasses.replace(data, tokenizer=os.fspath(path / next(iter(tokenizer))))
    run = dataclasses.replace(run, model=model, data=data, folder=os.fspath(path))
    check_destination(folder, STAGING, CheckpointError)
    staging, checkpoint, written = path / STAGING, path / "checkpoints" / "0", 0
    with (
        continuable(folder, CheckpointError),
        hold_folder(folder, CheckpointError, CheckpointError),
        Journal(staging / JOURNAL, _identity(source), CheckpointError) as journal,
    ):
        # A kill may have come between the rename and the end.
        if not checkpoint.exists():
            pieces = all_pieces(source)
            written = _copy(source, pieces, staging / "0" / MODEL, journal, on_progress)
            meta = {"config": to_dict(run), "import": _summary(source, journal)}
            write_files(staging / "0", all_arrays(pieces), meta)
            (path / "config.yaml").write_text(to_yaml(run), encoding="utf-8")
            for name, contents in tokenizer.items():
                (path / name).write_bytes(contents)
            checkpoint.parent.mkdir(exist_ok=True)
            os.rename(staging / "0", checkpoint)
        shutil.rmtree(staging)
    summary = read_meta(os.fspath(checkpoint))["import"]
    return Imported(checkpoint, written, time.monotonic() - start, summary)


def _identity(source: Source) -> dict[str, Any]:
    """Plain data that tells the weights of two imports apart, independent of their path."""
    sample = xxhash.xxh3_128()
    for spec in source.tensors.values():
        if not spec.param.is_matmul:
            row = (slice(0, 1), *spec.full_part[1:]) if len(spec.shape) > 1 else spec.full_part
            sample.update(source.read(spec.name, row).tobytes())
    tensors = {
        spec.name: {
            "shape": spec.shape,
            "dtype": str(spec.dtype),
            "groups": spec.groups,
            "bytes": spec.nbytes,
            "layers": spec.shape[0] if spec.param.is_stacked else None,
        }
        for spec in source.tensors.values()
    }
    facts = {"format": source.format, "dtype": source.dtype}
    return facts | {"tensors": tensors, "values": sample.hexdigest()}


def _copy(
    source: Source, pieces: list[Piece], folder: Path, journal: Journal, on_progress: OnProgress
) -> int:
    """Writes the unfinished pieces into `folder`; returns the bytes written."""
    if not all(
        isinstance(entry.get("name"), str) and isinstance(entry.get("checksum"), str)
        for entry in journal.entries
    ):
        remedy = f"delete {journal.path.parent}, or name another folder"
        raise CheckpointError(f"{journal.path}: is no journal of an import; {remedy}.")
    finished = {(entry["name"], entry.get("layer")) for entry in journal.entries}
    todo = [piece for piece in pieces if not (piece.key in finished and piece.is_in(folder))]
    total, remaining = (sum(piece.nbytes for piece in group) for group in (pieces, todo))
    folder.mkdir(parents=True, exist_ok=True)
    check_space(folder, remaining, CheckpointError)
    counter = ByteCounter(on_progress, total, total - remaining)

    def on_finished(piece: Piece, checksum: str) -> None:
        name, layer = piece.key
        entry: dict[str, Any] = {"name": name, "layer": layer, "checksum": checksum}
        if isinstance(source, MeasuredQuantizedSource) and piece.key in source.errors:
            entry["error"] = dataclasses.astuple(source.errors[piece.key])
        journal.append(entry)

    stream(source, todo, folder, counter.add, on_finished)
    return remaining


def _summary(source: Source, journal: Journal) -> dict[str, Any]:
    checksums: dict[str, Any] = {}
    errors: dict[str, ArrayDifference] = {}
    entries = {(entry["name"], entry["layer"]): entry for entry in journal.entries}
    for spec in source.tensors.values():
        of_tensor = [entries[spec.name, layer] for layer, _ in layer_pieces(spec)]
        layers = [entry["checksum"] for entry in of_tensor]
        checksums[spec.name] = layers if spec.param.is_stacked else layers[0]
        differences = [ArrayDifference(*entry["error"]) for entry in of_tensor if "error" in entry]
        if differences:
            errors[spec.name] = sum(differences, ArrayDifference())
    path = storage.pinned(source.path, CheckpointError)
    path = path if storage.is_remote(path) else os.path.abspath(path)
    return {
        "format": source.format,
        "path": path,
        "dtype": source.dtype,
        "tensors": len(source.tensors),
        "parameters": num_parameters(source.config),
        "bytes": source.nbytes,
        "checksum": ALGORITHM,
        "checksums": checksums,
        "rounding_errors": {
            name: {"relative": error.relative, "relative_rms": error.relative_rms}
            for name, error in errors.items()
        },
    }


def export_params(
    src: storage.StrPath,
    dst: storage.StrPath,
    dtype: str | None = None,
    tokenizer: Mapping[str, bytes] = NO_FILES,
    on_progress: OnProgress = no_progress,
) -> Imported:
    """Writes the parameters of the checkpoint at `src` (a run, its `checkpoints`, or a step), local
    or gs://, in `dtype`, to the new local folder `dst`, with the run's config and `tokenizer`.
    Raises CheckpointError for no finished checkpoint of ours, or anything else in `dst`."""
    step = step_folder(os.fspath(src))
    source = open_source(step)
    meta = read_meta(step)
    if "config" not in meta:
        raise CheckpointError(f"{step}: does not say what run it is of.")
    run = from_dict(meta["config"], storage.join(step, "meta", "metadata"))
    source = converted(source, dtype or source.dtype, measure=True)
    return import_weights(source, dst, run, tokenizer, on_progress)
