"""`grok data tokenizer`, `grok data prepare` and `grok data inspect`."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from grok.cli.export import size_in_bytes
from grok.cli.groups import Group
from grok.cli.options import COUNT, COUNT_OR_ZERO, PATH
from grok.cli.tables import make_console, make_table
from grok.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

    from grok.data.dataset_stats import DatasetStats

BAR = 40  # characters of the longest bar of a histogram
MISMATCH = 1  # exit code
BAD_SHARE = "Share of records that may be bad or repeat an id, and of bytes that may be lost."
RECORD_SIZE = "Most bytes of a record, decompressed; a longer one is bad."
SHARD_SIZE = "Most bytes of a shard's records; 1 MB is 10^6 bytes."
FORMAT, SHARE = click.Choice(["auto", "text", "jsonl", "parquet"]), click.FloatRange(0, 1)

TEMPLATE = (
    "Of messages: grok-1, grok-2, or a file.  [default: the one beside the tokenizer, or grok-1]"
)
DATE = "Date, as 2026-01-31, for a template that asks for one.  [default: today]"

_option = functools.partial(click.option, show_default=True)


@click.group(cls=Group)
def data() -> None:
    """Train tokenizers, and make and inspect datasets of tokens."""


@data.command()
@click.argument("files", type=PATH, nargs=-1)
@click.option("--out", type=PATH, metavar="FILE", help="Where the trained model is written.")
@click.option("--vocab-size", type=COUNT, help="Pieces, all of them.")
@click.option("--special", multiple=True, help="Text that is always one piece, as <|end|>.")
@click.option("--check", type=PATH, metavar="FILE", help="Compare it with --config instead.")
@click.option("--config", metavar="CONFIG", help="Preset or YAML file for --check.")
def tokenizer(files, out, vocab_size, special, check, config) -> None:
    """Train a SentencePiece tokenizer on text FILES (folders and patterns, too), or check one
    against a config.

    Trained ones are BPE with byte fallback; ids 0 to 3 are padding, begin, end and unknown."""
    if check:
        if not config or files:
            raise click.UsageError("--check FILE needs --config CONFIG, and no files.")
        click.echo(_check_tokenizer(check, config))
        return
    if not out or not vocab_size:
        raise click.UsageError("training needs --out FILE and --vocab-size N.")
    from grok.data.text_files import text_files
    from grok.data.tokenizers.sentencepiece import train_tokenizer

    trained = train_tokenizer(text_files(files), out, vocab_size, special)
    click.echo(f"{out}: {trained.vocab_size:,} pieces, end of sequence is {trained.eos_id}")


def _check_tokenizer(file: str, config: str) -> str:
    from grok.config.load import load_config
    from grok.data.tokenizers import load_tokenizer

    loaded, vocab_size = load_tokenizer(file), load_config(config).model.vocab_size
    if loaded.vocab_size > vocab_size:
        problem = f"tokenizer {file} has {loaded.vocab_size} pieces, more than model.vocab_size="
        right = f"model.vocab_size={loaded.vocab_size} would work"
        raise DataError(f"{problem}{vocab_size} of {config}; {right}.")
    if loaded.eos_id < 0:
        raise DataError(f"tokenizer {file} has no end-of-sequence piece to end documents with.")
    unused = vocab_size - loaded.vocab_size
    note = f", {unused:,} rows of the model's table are unused" if unused else ""
    begin = f"{loaded.bos_id}{' (added to every text)' if loaded.adds_bos else ''}"
    end = ", ".join(map(str, loaded.eos_ids))
    return (
        f"{file} fits {config}: {loaded.vocab_size:,} pieces, padding {loaded.pad_id}, begin "
        f"{begin}, end {end}{note}"
    )


# Options --NAME-field of `grok data prepare`: fields of grok.data.prepare.records.RecordFields.
FIELDS = {
    "text": "Field with the text.  [default: text]",
    "id": "Field to keep as a document's id.",
    "language": "Field to keep as its language.",
    "licence": "Field to keep as its licence.",
    "prompt": "Supervised: field before, without loss.",
    "completion": "Supervised: field that bears loss.",
    "messages": "Supervised: list of objects with role and content.",
}


def _field_options(command: Callable) -> Callable:
    for name, meaning in reversed(FIELDS.items()):
        command = click.option(f"--{name}-field", help=meaning)(command)
    return command


@data.command()
@click.argument("sources", type=PATH, nargs=-1, required=True)
@click.option("--out", required=True, type=PATH, metavar="DIR", help="Folder of the dataset.")
@click.option("--tokenizer", required=True, type=PATH, metavar="FILE", help="It, or its folder.")
@click.option(
    "--allow-special-tokens", is_flag=True, help="Read special tokens in the texts as such."
)
@click.option("--glob", "patterns", multiple=True, help="Names to take in folders, as *.md.")
@_option("--format", default="auto", type=FORMAT, help="What all files are; auto: by their names.")
@_field_options
@click.option("--chat-template", default="", type=PATH, metavar="NAME", help=TEMPLATE)
@click.option("--chat-date", default="", metavar="DATE", help=DATE)
@click.option("--licence", help="Licence of all sources.")
@click.option("--workers", type=COUNT, help="Processes.  [default: one a core]")
@_option("--shard-size", default="256MB", callback=size_in_bytes, help=SHARD_SIZE)
@click.option("--drop-duplicates", is_flag=True, help="Keep the first of documents alike.")
@_option("--max-bad-share", default=0.01, type=SHARE, help=BAD_SHARE)
@_option("--max-record-size", default="256MB", callback=size_in_bytes, help=RECORD_SIZE)
def prepare(out, tokenizer, workers, shard_size, max_record_size, **options) -> None:
    """Tokenise text of SOURCES into the folder of a dataset.

    SOURCES, local or gs://, are files or folders: plain text (a document each), JSON lines or
    Parquet (a document each record), any of them as .gz or .zst. The bytes written do not depend on
    --workers; after an interruption the same command continues. Bad records are listed in
    rejected.jsonl."""
    from grok.data.prepare.job import PrepareOptions, prepare_dataset
    from grok.data.prepare.records import RecordFields
    from grok.progress import ProgressDisplay

    names = {name: options.pop(f"{name}_field") for name in FIELDS}
    if bool(names["prompt"]) != bool(names["completion"]):
        raise click.UsageError("--prompt-field and --completion-field belong together.")
    kinds = [name for name in ("text", "prompt", "messages") if names[name]]
    if len(kinds) > 1:
        raise click.UsageError(f"--{kinds[0]}-field and --{kinds[1]}-field exclude each other.")
    for name in ("chat_template", "chat_date"):
        if options[name] and not names["messages"]:
            option = name.replace("_", "-")
            raise click.UsageError(f"--{option} is of messages; it needs --messages-field.")
    names["text"] = names["text"] or (None if kinds else "text")
    options |= {"workers": workers or os.cpu_count() or 1, "shard_bytes": shard_size}
    options["max_record_bytes"] = max_record_size
    job = PrepareOptions(tokenizer=tokenizer, fields=RecordFields(**names), **options)
    note = "SHA-256 of the sources"
    with ProgressDisplay("{share:4.0%}", total=1.0, note=note, stderr=True) as display:

        def on_progress(share: float, counts: Mapping[str, int]) -> None:
            if not display.due and display.done:  # called for every record
                return
            rate = display.rate("bytes", counts["bytes"]) / 1e6
            texts = (f"{counts[name]:,} {name}" for name in ("documents", "tokens"))
            display.update(share, *texts, f"{rate:,.1f} MB/s")

        manifest = prepare_dataset(job, out, on_progress, display.log)
    counts = manifest["counts"]
    click.echo(
        f"{_plural(counts['documents'], 'document')}, {_plural(counts['tokens'], 'token')} of "
        f"{_plural(counts['bytes'], 'byte')}, in {_plural(len(manifest['shards']), 'shard')}"
    )
    if counts["rejected"]:
        rejected = Path(out) / "rejected.jsonl"
        lost = f", {counts['lost_bytes']:,} bytes of files" if counts["lost_bytes"] else ""
        click.echo(f"{_plural(counts['rejected'], 'bad record')}{lost} left out: {rejected}")
    if counts["repeated_ids"]:
        repeated = _plural(counts["repeated_ids"], "document")
        click.echo(f"{repeated} kept that have the id of an earlier one")
    if counts["duplicates"]:
        click.echo(f"{_plural(counts['duplicates'], 'duplicate')} left out")
    click.echo(f"{out}: complete")


@data.command()
@click.argument("folder", type=PATH, metavar="DIR")
@_option("--length", default=2048, type=COUNT, help="Tokens of a row, for the packing.")
@_option("--samples", default=2, type=COUNT_OR_ZERO, help="To show.")
@click.option(
    "--tokenizer", type=PATH, metavar="FILE", help="For samples.  [default: the dataset's]"
)
@click.option("--check", "verify", is_flag=True, help="Compare all files with the manifest.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.pass_context
def inspect(ctx: click.Context, folder, length, samples, tokenizer, verify, as_json) -> None:
    """Show counts, lengths, packing efficiency and samples of the dataset at DIR.

    With --check the exit code is 1 where a file does not match the manifest."""
    from grok.data.dataset_stats import compute_stats

    stats = compute_stats(folder, length, samples, tokenizer, verify)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(stats), indent=2))
    else:
        console = make_console()
        _print_counts(console, folder, stats, verify)
        _print_documents(console, stats)
    ctx.exit(MISMATCH if stats.problems else 0)


def _print_counts(console: "Console", folder: str, stats: "DatasetStats", verified: bool) -> None:
    manifest, counts = stats.manifest, stats.manifest["counts"]
    names = ("documents", "bytes", "tokens", "loss_tokens", "rejected", "duplicates")
    rows = [(name.replace("_", " "), f"{counts[name]:,}") for name in names]
    rows.append(("tokenizer", f"{manifest['tokenizer']['vocab_size']:,} pieces"))
    rows.append(("shards", f"{len(manifest['shards']):,}"))
    rows.append(("hash", stats.hash))
    for source in manifest["sources"]:
        licence = f", {source['licence']}" if source.get("licence") else ""
        documents, tokens = source["counts"]["documents"], source["counts"]["tokens"]
        files = _plural(source["files"], "file")
        text = f"{source['name']}: {files}, {documents:,} documents, {tokens:,} tokens{licence}"
        rows.append(("source", text))
    shares = " and ".join(f"{share:.2%} with {name}" for name, share in stats.efficiency.items())
    truncated = f"(which truncates {stats.truncated_share:.1%} of tokens)"
    rows.append(("packing", f"at length {stats.sequence_length}: {shares} {truncated}"))
    if verified:
        rows.append(("files", "differ" if stats.problems else "match the manifest"))
    console.print(folder, style="bold")
    for label, text in rows:
        console.print(f"  {label:<12}{text}")
    for problem in stats.problems:
        console.print(f"  {'problem':<12}{problem}", style="red")


def _print_documents(console: "Console", stats: "DatasetStats") -> None:
    table = make_table("length", "documents", "tokens", "", right=3)
    table.columns[-1].justify = "left"
    most = max(bin["documents"] for bin in stats.histogram)
    for bin in stats.histogram:
        bar = "█" * -(-BAR * bin["documents"] // most)
        lengths, documents = "{low}-{high}".format(**bin), f"{bin['documents']:,}"
        table.add_row(lengths, documents, f"{bin['tokens']:,}", bar)
    console.print()
    console.print(table)
    for sample in stats.samples:
        share = sample["loss_share"]
        header = "\ndocument {document}, {tokens:,} tokens".format(**sample)
        console.print(f"{header}{f', loss on {share:.0%}' if share < 1 else ''}", style="bold")
        for value in [sample["metadata"]] * bool(sample["metadata"]) + [sample["text"]]:
            console.print(f"  {json.dumps(value, ensure_ascii=False)}")


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
