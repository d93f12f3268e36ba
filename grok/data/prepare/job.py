"""From files of text to a prepared dataset: read, tokenised by many processes, written in order.

A document depends on its record alone and shards are cut by the documents before, so the bytes
depend neither on the number of processes nor on kills between.
"""

import collections
import dataclasses
import hashlib
import itertools
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grok import __version__, storage
from grok.data.dataset import MANIFEST_FILE, read_manifest
from grok.data.prepare.manifest import (
    REJECTED_FILE,
    add_counts,
    describe_sources,
    rejected_lines,
    write_dataset,
)
from grok.data.prepare.records import PLAIN, RecordFields
from grok.data.prepare.shards import (
    ShardEntry,
    ShardJournal,
    ShardWriter,
    exclusive_lock,
    identity_difference,
    write_atomically,
)
from grok.data.prepare.sources import RawRecord, SourceFile, find_files, hash_files, read_records
from grok.data.prepare.workers import RecordGroup, encode_records
from grok.data.tokenizers import Tokenizer, load_tokenizer
from grok.errors import DataError

UNFINISHED = "unfinished"
# What a process is given at once: enough to make handing it over cheap.
UNIT_BYTES = 1 << 18
UNIT_RECORDS = 1024
# The share of bad records is looked at this often, so that a hopeless job stops early.
CHECK_RECORDS = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What to prepare, and how.

    sources: files or folders, here or at gs://; patterns: of file names inside folders; format:
    auto, text, jsonl or parquet; licence: of all sources; shard_bytes: most of a shard's records;
    max_bad_share: of all records, before the job stops; workers: processes that tokenise.
    """

    sources: tuple[str, ...]
    tokenizer: str
    patterns: tuple[str, ...] = ()
    format: str = "auto"
    fields: RecordFields = PLAIN
    licence: str | None = None
    shard_bytes: int = 256 * 10**6
    drop_duplicates: bool = False
    max_bad_share: float = 0.01
    workers: int = 1


@dataclasses.dataclass(frozen=True)
class PrepareProgress:
    """How far a job is: documents, tokens and bytes of text by now, and its share of all input."""

    documents: int
    tokens: int
    bytes: int
    share: float


def prepare_dataset(
    options: PrepareOptions,
    out: str | Path,
    tell: Callable[[PrepareProgress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Write the prepared dataset of these options to the folder `out`; gives its manifest.

    Killed, the same call goes on after the last finished shard. DataError where a source or the
    tokenizer cannot be used, the folder holds something else, or too many records are bad.
    """
    folder = Path(out)
    for source in options.sources:
        if Path(source).resolve() in (folder.resolve(), *folder.resolve().parents):
            raise DataError(
                f"{folder} is inside source {source} and would be read as one of its files; a "
                f"folder beside it would work."
            )
    model, tokenizer = storage.read_bytes(options.tokenizer, DataError), load(options.tokenizer)
    files = hash_files(find_files(options.sources, options.patterns, options.format))
    identity = _identity(options, files, model, tokenizer)
    if (folder / MANIFEST_FILE).exists():
        manifest = read_manifest(folder)
        made = {key: manifest[key] for key in identity}
        made["sources"] = [
            {key: value for key, value in source.items() if key != "counts"}
            for source in made["sources"]
        ]
        if changed := identity_difference(made, identity):
            raise DataError(f"{folder} was made with {changed}; another folder would work.")
        # Left where the kill came after the last step but one.
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        return manifest
    with exclusive_lock(folder / UNFINISHED):
        journal = ShardJournal(folder / UNFINISHED, identity)
        if not journal.ended:
            _write_shards(options, files, tokenizer, folder, journal, tell)
        totals = _totals(journal.entries)
        _check_share(options, folder, totals, journal.entries)
        if not totals["documents"]:
            raise DataError(
                f"{', '.join(options.sources)}: of {_records(totals):,} records none is good; text "
                f"would work."
            )
        return write_dataset(folder, journal, identity, files, model)


def load(path: str) -> Tokenizer:
    """A tokenizer that can end documents; DataError where it has no piece for that."""
    tokenizer = load_tokenizer(path)
    if tokenizer.eos_id < 0:
        raise DataError(
            f"tokenizer {path} has no end-of-sequence piece to end documents with; one that `grok "
            f"data tokenizer` trained would work."
        )
    return tokenizer


def _identity(
    options: PrepareOptions, files: Sequence[SourceFile], model: bytes, tokenizer: Tokenizer
) -> dict[str, Any]:
    """All that the bytes of the dataset depend on."""
    fields = {key: name for key, name in dataclasses.asdict(options.fields).items() if name}
    return {
        "code_version": __version__,
        "tokenizer": {
            "sha256": hashlib.sha256(model).hexdigest(),
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
        },
        "options": {
            "patterns": list(options.patterns),
            "format": options.format,
            "fields": fields,
            "licence": options.licence,
            "shard_bytes": options.shard_bytes,
            "drop_duplicates": options.drop_duplicates,
        },
        "sources": describe_sources(options.sources, files, options.licence),
    }


def _write_shards(
    options: PrepareOptions,
    files: Sequence[SourceFile],
    tokenizer: Tokenizer,
    folder: Path,
    journal: ShardJournal,
    tell: Callable[[PrepareProgress], None],
) -> None:
    """Write all shards that the journal has not."""
    seen = {digest for entry in journal.entries for digest in entry.digests}
    totals = collections.Counter(_totals(journal.entries))
    sizes = list(itertools.accumulate((file.bytes for file in files), initial=0))
    shards = ShardWriter(journal, options.shard_bytes)
    records = read_records(files, options.fields.names(), journal.position)
    encoded = encode_records(
        _units(records, files, options), tokenizer, options.fields, options.workers
    )
    try:
        for raw, result in encoded:
            file = files[raw.file]
            if isinstance(result, str):
                line = {"file": file.name, "line": raw.line, "reason": result}
                shards.entry.rejected.append(line)
                outcome = {"rejected": 1}
            elif options.drop_duplicates and result.digest.hex() in seen:
                outcome = {"duplicates": 1}
            else:
                if not shards.fits(result):
                    shards.finish((raw.file, raw.number))
                shards.write(result)
                if options.drop_duplicates:
                    seen.add(result.digest.hex())
                    shards.entry.digests.append(result.digest.hex())
                outcome = {
                    "documents": 1,
                    "bytes": result.text_bytes,
                    "tokens": result.tokens,
                    "loss_tokens": result.loss_tokens,
                }
            shards.entry.add(file.source, **outcome)
            totals.update(outcome)
            if _records(totals) % CHECK_RECORDS == 0:
                _check_share(options, folder, totals, [*journal.entries, shards.entry])
            share = (sizes[raw.file] + raw.offset) / max(1, sizes[-1])
            tell(PrepareProgress(totals["documents"], totals["tokens"], totals["bytes"], share))
        shards.finish((len(files), 0), ended=True)
    finally:
        encoded.close()
        shards.abandon()


def _units(
    records: Iterable[RawRecord], files: Sequence[SourceFile], options: PrepareOptions
) -> Iterator[RecordGroup]:
    """Consecutive records, as many as a process is given at once."""
    unit: RecordGroup = []
    size = 0
    for raw in records:
        file = files[raw.file]
        kept: dict[str, Any] = {"source": file.source}
        if options.licence is not None:
            kept["licence"] = options.licence
        if file.format == "text":
            kept["id"] = file.name.encode(errors="replace").decode()
        unit.append((raw, kept))
        # Of a row of a Parquet file the size is not known.
        size += len(raw.data) if isinstance(raw.data, bytes) else UNIT_BYTES // 64
        if size >= UNIT_BYTES or len(unit) == UNIT_RECORDS:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


def _totals(entries: Sequence[ShardEntry]) -> dict[str, int]:
    return add_counts(counts for entry in entries for counts in entry.counts.values())


def _records(totals: Mapping[str, int]) -> int:
    return totals["documents"] + totals["duplicates"] + totals["rejected"]


def _check_share(
    options: PrepareOptions, folder: Path, totals: Mapping[str, int], entries: Sequence[ShardEntry]
) -> None:
    """DataError, with the bad records in a file, where they are too many."""
    bad, records = totals["rejected"], _records(totals)
    if bad <= options.max_bad_share * records:
        return
    write_atomically(folder / REJECTED_FILE, rejected_lines(entries))
    first = next(line for entry in entries for line in entry.rejected)
    place = first["file"] if first["line"] is None else f"{first['file']}:{first['line']}"
    raise DataError(
        f"{bad:,} of {records:,} records are bad, {bad / records:.2%}, more than --max-bad-share "
        f"{options.max_bad_share:g} allows (all are in {folder / REJECTED_FILE}); the first: "
        f"{place}: {first['reason']}. The same command with --max-bad-share "
        f"{_above(bad / records)} goes on."
    )


def _above(share: float) -> float:
    """A share of two digits that is no less."""
    return math.ceil(share * 100) / 100
