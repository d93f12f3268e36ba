"""`grok data prepare`: from files of text to a token dataset. A document depends on its record
alone and shards are cut by the documents before, in the order of the input, so the bytes depend
neither on the number of processes that tokenize nor on interruptions."""

import collections
import dataclasses
import datetime
import functools
import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grok import __version__
from grok.data.chat.encoder import ChatEncoder
from grok.data.chat.template import ChatTemplate, built_in, find_template
from grok.data.manifest import MANIFEST_FILE, read_manifest
from grok.data.prepare.limits import check_bad_share, num_records
from grok.data.prepare.records import (
    DocumentEncoder,
    RecordFields,
    RecordGroup,
    encode_records,
)
from grok.data.prepare.shards import (
    ShardJournal,
    ShardWriter,
    describe_sources,
    sum_counts,
    write_dataset,
)
from grok.data.prepare.sources import (
    RECORD_BYTES,
    RawRecord,
    SourceFile,
    find_files,
    hash_files,
    read_records,
)
from grok.data.tokenizers import Tokenizer, load_tokenizer, start_ids
from grok.errors import DataError
from grok.locks.folder import hold_folder
from grok.resumable import difference

UNFINISHED = "unfinished"
# Size of what a process is given at once: enough to make handing it over cheap.
GROUP_BYTES = 1 << 18
GROUP_RECORDS = 1024
# The share of bad records is checked this often, so that a hopeless job stops early.
CHECK_RECORDS = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Input and settings of a job."""

    sources: tuple[str, ...]  # files or folders, local or at gs://
    tokenizer: str
    patterns: tuple[str, ...] = ()  # of file names inside folders
    format: str = "auto"  # or text, jsonl, parquet
    fields: RecordFields = dataclasses.field(default=RecordFields())
    licence: str | None = None  # of all sources
    shard_bytes: int = 256 * 10**6  # of a shard's records, at most
    drop_duplicates: bool = False
    # Of records that are bad or repeat an id, and of bytes that are lost, before the job stops.
    max_bad_share: float = 0.01
    max_record_bytes: int = RECORD_BYTES  # decompressed; a longer record is bad
    workers: int = 1  # processes that tokenize
    allow_special_tokens: bool = False  # special tokens in a text are read as such
    chat_template: str = ""  # of messages, as `find_template` takes it
    chat_date: str = ""  # ISO date that a template sees which asks for one; none: today


OnProgress = Callable[[float, Mapping[str, int]], None]  # share of the input, counts so far


def prepare_dataset(
    options: PrepareOptions,
    out: str | Path,
    on_progress: OnProgress = lambda share, counts: None,
    log: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Writes the dataset of these options to the folder `out`; returns its manifest. After an
    interruption, the same call continues after the last finished shard. `log` gets sentences on
    what may be amiss. DataError where a source, the tokenizer or the chat template cannot be used,
    the folder holds another dataset, or too many records are bad."""
    folder = Path(out)
    for source in options.sources:
        if Path(source).resolve() in (folder.resolve(), *folder.resolve().parents):
            inside = f"{folder} is inside source {source} and would be read as one of its files"
            raise DataError(f"{inside}; a folder beside it would work.")
    with hold_folder(folder, DataError, DataError):
        return _prepare(options, folder, on_progress, log)


def _prepare(
    options: PrepareOptions, folder: Path, on_progress: OnProgress, log: Callable[[str], None]
) -> dict[str, Any]:
    tokenizer = load_tokenizer(options.tokenizer)
    if tokenizer.eos_id < 0:
        problem = f"tokenizer {options.tokenizer} has no end-of-sequence piece to end documents"
        raise DataError(f"{problem} with; one that `grok data tokenizer` trained would work.")
    files = hash_files(find_files(options.sources, options.patterns, options.format))
    template = _chat_template(options, tokenizer, log) if options.fields.messages else None
    date = _chat_date(options, template)
    identity = _identity(options, files, tokenizer)
    if template is not None:
        digest = hashlib.sha256(template.text.encode()).hexdigest()
        identity["chat"] = {"template_sha256": digest, "date": date}
    if (folder / MANIFEST_FILE).exists():
        return _finished_manifest(folder, identity)
    with ShardJournal(folder / UNFINISHED, identity) as journal:
        if not journal.is_complete:
            make_encoder = functools.partial(
                DocumentEncoder,
                tokenizer,
                options.fields,
                options.allow_special_tokens,
                template,
                date,
            )
            _write_shards(options, files, make_encoder, folder, journal, on_progress)
        totals = sum_counts(journal.entries)
        check_bad_share(options.max_bad_share, files, folder, totals, journal.entries)
        if not totals["documents"]:
            sources, records = ", ".join(options.sources), f"{num_records(totals):,} records"
            raise DataError(f"{sources}: of {records} none is good; text would work.")
        contents = tokenizer.files
        if template is not None:
            contents = dataclasses.replace(contents, template=template.text)
        return write_dataset(folder, journal, identity, files, contents.contents())


def _chat_template(
    options: PrepareOptions, tokenizer: Tokenizer, log: Callable[[str], None]
) -> ChatTemplate:
    """The template of the job's messages, tried on a conversation."""
    template = find_template(options.chat_template, tokenizer) or built_in("grok-1")
    encoder = ChatEncoder(template, tokenizer, options.allow_special_tokens)
    if not encoder.finds_answers:
        problem = f"{template.origin} gives no way to tell what an assistant wrote"
        right = "a template with {% generation %} around answers would work"
        raise DataError(f"{problem}; {right}.")
    for notice in encoder.notices:
        log(notice)
    return template


def _chat_date(options: PrepareOptions, template: ChatTemplate | None) -> str | None:
    """The date that the template sees, so that a job that continues later gives the same bytes."""
    date = options.chat_date
    if template is None or "strftime_now" not in template.text:
        if date:
            raise DataError(f"the chat template asks for no date; without {date} it would work.")
        return None
    try:
        return datetime.date.fromisoformat(date).isoformat() if date else str(datetime.date.today())
    except ValueError:
        raise DataError(f"{date} is no date such as 2026-01-31.") from None


def _identity(
    options: PrepareOptions, files: Sequence[SourceFile], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Everything that the bytes of the dataset depend on."""
    names = [
        *("patterns", "format", "fields", "licence", "shard_bytes", "drop_duplicates"),
        "allow_special_tokens",
        "max_record_bytes",
    ]
    settings = dataclasses.asdict(options) | {"patterns": list(options.patterns)}
    settings["fields"] = {key: name for key, name in settings["fields"].items() if name}
    return {
        "code_version": __version__,
        "tokenizer": {
            "sha256": tokenizer.files.sha256,
            "vocab_size": tokenizer.vocab_size,
            "start_ids": start_ids(tokenizer),
            "eos_id": tokenizer.eos_id,
        },
        "options": {name: settings[name] for name in names},
        "sources": describe_sources(options.sources, files, options.licence),
    }


def _finished_manifest(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    manifest = read_manifest(folder)
    stored = {key: manifest[key] for key in identity}
    stored["sources"] = [dict(source) for source in stored["sources"]]
    for source in stored["sources"]:
        del source["counts"]
    if changed := difference(stored, identity):
        raise DataError(f"{folder} is another dataset ({changed}); another folder would work.")
    # Left over when a job is killed between writing the manifest and its last step.
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    return manifest


def _write_shards(
    options: PrepareOptions,
    files: Sequence[SourceFile],
    make_encoder: Callable[[], DocumentEncoder],
    folder: Path,
    journal: ShardJournal,
    on_progress: OnProgress,
) -> None:
    digests = {digest for entry in journal.entries for digest in entry.digests}
    ids = {digest for entry in journal.entries for digest in entry.ids}
    totals = collections.Counter(sum_counts(journal.entries))
    offsets = list(itertools.accumulate((file.bytes for file in files), initial=0))
    shards = ShardWriter(journal, options.shard_bytes)
    names, most_bytes = options.fields.names(), options.max_record_bytes
    records = read_records(files, names, journal.position, most_bytes)
    groups = _group_records(records, files, options.licence)
    encoded = encode_records(groups, make_encoder, options.workers)
    try:
        for raw, result in encoded:
            file = files[raw.file]
            if isinstance(result, str):
                # A file that is one document is lost with it.
                lost = file.bytes if raw.line is None else raw.lost_bytes
                counts = {"rejected": raw.records, "lost_bytes": lost}
                line = {"file": file.name, "line": raw.line, "reason": result}
                shards.entry.rejected.append(line)
            elif options.drop_duplicates and result.digest.hex() in digests:
                counts = {"duplicates": 1}
            else:
                shards.write(result, (raw.file, raw.number))
                if options.drop_duplicates:
                    digests.add(result.digest.hex())
                    shards.entry.digests.append(result.digest.hex())
                counts = {"documents": 1, "bytes": result.text_bytes, "tokens": result.tokens}
                counts["loss_tokens"] = result.loss_tokens
                if result.id_digest is not None:
                    counts["repeated_ids"] = shards.entry.add_id(result.id_digest.hex(), ids)
            shards.entry.add(file.source, **counts)
            totals.update(counts)
            if num_records(totals) % CHECK_RECORDS == 0:
                entries = [*journal.entries, shards.entry]
                check_bad_share(options.max_bad_share, files, folder, totals, entries)
            on_progress((offsets[raw.file] + raw.offset) / max(1, offsets[-1]), totals)
        shards.finish((len(files), 0), is_last=True)
    finally:
        encoded.close()
        shards.abandon()


def _group_records(
    records: Iterable[RawRecord], files: Sequence[SourceFile], licence: str | None
) -> Iterator[RecordGroup]:
    group, size = RecordGroup(), 0
    for raw in records:
        file = files[raw.file]
        metadata: dict[str, Any] = {"source": file.source}
        if licence is not None:
            metadata["licence"] = licence
        if file.format == "text":
            metadata["id"] = file.name.encode(errors="replace").decode()
        group.append((raw, metadata))
        # The size of a row of a Parquet file is unknown.
        size += len(raw.data) if isinstance(raw.data, bytes) else GROUP_BYTES // 64
        if size >= GROUP_BYTES or len(group) == GROUP_RECORDS:
            yield group
            group, size = [], 0
    if group:
        yield group
