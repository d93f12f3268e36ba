"""Any source of weights -> a checkpoint of ours, streamed, and restartable after a kill.

Until all is done it lies in the folder `.import` of the destination, with a journal of the finished
pieces; a rename to `checkpoints/0` then makes it a checkpoint at once.
"""

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from grok import storage
from grok.config import RunConfig
from grok.config.load import to_dict
from grok.config.text import to_yaml
from grok.errors import CheckpointError
from grok.model import params
from grok.weights.checksums import ALGORITHM
from grok.weights.importing.journal import Journal
from grok.weights.importing.quantization_error import MeasuredQuantizedSource, RoundingError
from grok.weights.importing.streaming import Piece, all_arrays, all_pieces, stream
from grok.weights.orbax.metadata import MODEL, read_meta, write_files
from grok.weights.source import Source, pieces

STAGING = ".import"

# Told of a tensor's name, the bytes done, and the bytes of the whole checkpoint.
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Imported:
    """A finished import: the checkpoint's folder, and the bytes and seconds that this call took.

    `kept` is what the checkpoint keeps of it: `format` and `path` of the source, `dtype`,
    `tensors`, `parameters` and `bytes`; the name of the `checksum` and the `checksums` by tensor, a
    list of one for each layer where it has layers; and of matrices quantised on the way
    `rounding_errors` by tensor, `relative` and `relative_rms`.
    """

    checkpoint: Path
    written: int
    seconds: float
    kept: dict[str, Any]


def import_weights(
    source: Source,
    folder: str | os.PathLike[str],
    run: RunConfig,
    tokenizer: Path | None = None,
    progress: Progress = lambda name, done, total: None,
) -> Imported:
    """Makes `folder` the folder of a run whose checkpoint, of step 0, holds `source` as it is.

    The run is `run` with the source's model, kept in the source's type, and `tokenizer`. Called
    again after it was ended in any way, it goes on with the first piece that is not finished.
    Raises CheckpointError where `folder` is remote, has anything else in it or cannot be written,
    where an earlier try was of other weights, and for what `source` cannot read.
    """
    start = time.monotonic()
    place = Path(folder)
    run = _resolved(run, source, place, tokenizer)
    _check_destination(folder)
    staging, checkpoint, written = place / STAGING, place / "checkpoints" / "0", 0
    identity = _identity(source)
    try:
        staging.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(Journal(staging / "journal.jsonl", identity)) as journal:
            # An earlier try may have ended between the rename and the end.
            if not checkpoint.exists():
                every = all_pieces(source)
                written = _copy(source, every, staging / "0" / MODEL, journal, progress)
                meta = {"config": to_dict(run), "import": _kept(source, journal)}
                write_files(staging / "0", all_arrays(every), meta)
                (place / "config.yaml").write_text(to_yaml(run), encoding="utf-8")
                if tokenizer is not None:
                    shutil.copyfile(tokenizer, run.data.tokenizer)
                checkpoint.parent.mkdir(exist_ok=True)
                os.rename(staging / "0", checkpoint)
            shutil.rmtree(staging)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be written: {error.strerror or error}; what is done is kept, and "
            "the same command goes on from there."
        ) from error
    kept = read_meta(os.fspath(checkpoint))["import"]
    return Imported(checkpoint, written, time.monotonic() - start, kept)


def _resolved(run: RunConfig, source: Source, folder: Path, tokenizer: Path | None) -> RunConfig:
    """`run` with what the import decides."""
    model: Any = {"param_dtype": source.dtype}
    data = run.data
    if tokenizer is not None:
        data = dataclasses.replace(data, tokenizer=os.fspath(folder / "tokenizer.model"))
    return dataclasses.replace(
        run, model=dataclasses.replace(source.config, **model), data=data, folder=os.fspath(folder)
    )


def _check_destination(folder: str | os.PathLike[str]) -> None:
    if storage.is_remote(folder):
        raise CheckpointError(
            f"{folder}: imports go to a local folder, which can then be copied, as by `gcloud "
            "storage cp --recursive`."
        )
    if not storage.exists(folder, CheckpointError):
        return
    present = storage.list_files(folder, CheckpointError)
    if STAGING in present:
        return
    if "checkpoints" in present:
        raise CheckpointError(f"{folder}: has checkpoints already; name another folder.")
    if present:
        raise CheckpointError(
            f"{folder}: is not empty (it has {sorted(present)[0]}), and an import goes to a folder "
            "of its own."
        )


def _identity(source: Source) -> dict[str, Any]:
    """What tells the weights of two imports apart, wherever they lie."""
    sample = xxhash.xxh3_128()
    for spec in source.tensors.values():
        if spec.name not in params.MATRICES:
            row = (slice(0, 1), *spec.whole[1:]) if len(spec.shape) > 1 else spec.whole
            sample.update(source.read(spec.name, row).tobytes())
    tensors = {s.name: [s.shape, str(s.dtype), s.groups] for s in source.tensors.values()}
    return {
        "format": source.format,
        "dtype": source.dtype,
        "tensors": tensors,
        "values": sample.hexdigest(),
    }


def _copy(
    source: Source, every: list[Piece], folder: Path, journal: Journal, progress: Progress
) -> int:
    """Writes the pieces that are not finished into `folder`; the bytes written."""
    todo = [piece for piece in every if not (piece.key in journal.done and piece.is_in(folder))]
    total, left = (sum(piece.nbytes for piece in some) for some in (every, todo))
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if left > free:
        raise CheckpointError(
            f"{folder}: {left:,} bytes are to be written, and the disk has {free:,} free."
        )
    done = total - left
    progress("", done, total)

    def on_written(piece: Piece, count: int) -> None:
        nonlocal done
        done += count
        progress(piece.spec.name, done, total)

    def on_finished(piece: Piece, checksum: str) -> None:
        facts = {}
        if isinstance(source, MeasuredQuantizedSource) and piece.key in source.errors:
            facts["error"] = dataclasses.astuple(source.errors[piece.key])
        journal.add(piece.key, checksum=checksum, **facts)

    stream(source, todo, folder, on_written, on_finished)
    return left


def _kept(source: Source, journal: Journal) -> dict[str, Any]:
    """The `kept` of `Imported`."""
    checksums: dict[str, Any] = {}
    errors: dict[str, RoundingError] = {}
    for spec in source.tensors.values():
        facts = [journal.done[spec.name, layer] for layer, _ in pieces(spec)]
        found = [each["checksum"] for each in facts]
        checksums[spec.name] = found if spec.name.startswith("layers/") else found[0]
        parts = [RoundingError(*each["error"]) for each in facts if "error" in each]
        if parts:
            errors[spec.name] = sum(parts, RoundingError())
    path = source.path if storage.is_remote(source.path) else os.path.abspath(source.path)
    return {
        "format": source.format,
        "path": path,
        "dtype": source.dtype,
        "tensors": len(source.tensors),
        "parameters": source.config.num_parameters(),
        "bytes": sum(spec.nbytes for spec in source.tensors.values()),
        "checksum": ALGORITHM,
        "checksums": checksums,
        "rounding_errors": {
            name: {"relative": error.relative, "relative_rms": error.relative_rms}
            for name, error in errors.items()
        },
    }
