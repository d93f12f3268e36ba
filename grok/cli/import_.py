"""`grok import`."""

import functools
import resource
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from grok.cli.groups import Group
from grok.cli.options import PATH
from grok.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from grok.data.tokenizers import Tokenizer
    from grok.weights.importing.importer import Imported

FORMATS = {"xai": "the release's (ckpt-0)", "huggingface": "Hugging Face's", "orbax": "grok's own"}
COMMANDS = {"xai": "xai", "huggingface": "hf"}
NAMED_FILES = 5  # in a message
DTYPES = click.Choice(["int4_all", "int4", "int8", "bfloat16", "float32"])


@click.group("import", cls=Group)
def import_() -> None:
    """Bring weights into a checkpoint of grok."""


def _options(dtype: str) -> Callable:
    decorators = (
        click.argument("src", type=PATH),
        click.argument("dst", type=PATH),
        click.option("--config", metavar="CONFIG", help="Preset or YAML file of SRC's model."),
        click.option(
            "--dtype",
            default=dtype,
            show_default=True,
            type=DTYPES,
            help="Type of the matrices; with int8 all else is float32; with int4 those of "
            "attention are int8, with int4_all they are int4 too.",
        ),
        click.option(
            "--scales",
            type=click.Choice(["release", "per-channel"]),
            help="Where floats become int8: scales for groups of rows as in the release (the "
            "default), or one for each column.",
        ),
        click.option(
            "--tokenizer",
            type=PATH,
            metavar="FILE",
            help="Tokenizer to go with the weights, or a folder with one.  [default: SRC's]",
        ),
        click.option(
            "--checksums",
            metavar="FILE",
            help="Published SHA-256 checksums of SRC's files, as sha256sum writes them, with which "
            "the files are compared first.",
        ),
    )

    return lambda command: functools.reduce(lambda f, add: add(f), reversed(decorators), command)


@import_.command()
@_options(dtype="int8")
def xai(src, dst, config, dtype, scales, tokenizer, checksums) -> None:
    """Import xAI's release, the ckpt-0 folder SRC, local or gs://, into the new folder DST.

    int8 matrices stay as they are, bit for bit, or become floats or int4. After an interruption the
    same command continues with the unfinished tensors.
    """
    _import("xai", src, dst, config, dtype, scales, tokenizer, checksums)


@import_.command()
@_options(dtype="bfloat16")
def hf(src, dst, config, dtype, scales, tokenizer, checksums) -> None:
    """Import the Hugging Face folder SRC, local, gs:// or hf://ORG/NAME, into the new folder DST.

    Grok-1 (hpcai-tech/grok-1, keyfan/grok-1-hf), Grok-2 in the files of its release, Llama, Mistral
    and Mixtral are known. After an interruption the same command continues with the unfinished
    tensors.
    """
    _import("huggingface", src, dst, config, dtype, scales, tokenizer, checksums)


def _import(expected_format, src, dst, config, dtype, scales, tokenizer, checksums) -> None:
    from grok.config import DataConfig, RunConfig
    from grok.config.load import load_config
    from grok.config.model import QUANTIZED_DTYPES
    from grok.progress import byte_progress
    from grok.weights.cast import converted, per_channel, release_groups
    from grok.weights.detect import open_source
    from grok.weights.importing.importer import import_weights

    if checksums is not None:
        check_published(src, checksums)
    run = load_config(config) if config else None
    source = open_source(src, run.model if run else None)
    if source.format != expected_format:
        other = COMMANDS.get(source.format)
        hint = f"`grok import {other}` takes it" if other else "it needs no import"
        raise CheckpointError(f"{src}: is in {FORMATS[source.format]} format; {hint}.")
    if run is None:
        length = min(DataConfig.sequence_length, source.config.context_length)
        run = RunConfig(model=source.config, data=DataConfig(sequence_length=length))
    pieces = tokenizer_of(tokenizer, [src], source.config.vocab_size)
    quantises = dtype in QUANTIZED_DTYPES and source.dtype not in QUANTIZED_DTYPES
    if scales is not None and not quantises:
        raise ConfigError(
            f"--scales {scales} is for floats that become int8; {source.path} holds "
            f"{source.dtype} and --dtype is {dtype}."
        )
    groups = per_channel if scales == "per-channel" else release_groups
    source = converted(source, dtype, groups, measure=True)
    with byte_progress() as on_progress:
        contents = pieces.files.contents() if pieces else {}
        imported = import_weights(source, dst, run, contents, on_progress)
    print_import(imported)


def check_published(folder: str, file: str) -> None:
    """Compares the files in `folder` with the checksums in `file`, and says how many there are.
    CheckpointError where one differs."""
    from grok.progress import byte_progress
    from grok.weights.tools.checksums import read_published, verify_published

    published = read_published(file)
    with byte_progress() as on_progress:
        results = list(verify_published(folder, published, on_progress))
    differing = [result.name for result in results if not result.equal]
    if differing:
        raise CheckpointError(
            f"{folder}: {len(differing)} of {len(results)} files have other bytes than {file} "
            f"says: {', '.join(differing[:NAMED_FILES])}; nothing was imported."
        )
    click.echo(f"{len(results)} files are as {file} says")


def tokenizer_of(file: str | None, folders: Sequence[str], vocab_size: int) -> "Tokenizer | None":
    """The tokenizer in `file`, or else in one of the folders, if any has one. DataError where it
    cannot be read, or has more pieces than the model knows."""
    from grok.data.tokenizers import load_tokenizer
    from grok.data.tokenizers.files import find_tokenizer_file

    if (path := file or find_tokenizer_file(folders)) is None:
        return None
    tokenizer = load_tokenizer(path)
    if (pieces := tokenizer.vocab_size) > vocab_size:
        raise DataError(
            f"{path}: has {pieces} pieces, and the model's vocab_size is {vocab_size}; it is the "
            "tokenizer of another model."
        )
    return tokenizer


def print_import(imported: "Imported") -> None:
    """Prints what an import wrote, its rate, and the rounding errors of quantised matrices."""
    summary = imported.summary
    # In KiB on Linux, in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    click.echo(
        f"{summary['tensors']:,} tensors, {summary['parameters']:,} parameters, "
        f"{summary['dtype']}, {summary['bytes']:,} bytes"
    )
    click.echo(
        f"{imported.written:,} bytes written in {imported.seconds:.1f} s, "
        f"{imported.written / imported.seconds / 1e9:.2f} GB/s; peak memory {peak / 1e9:.2f} GB"
    )
    if summary["rounding_errors"]:
        dtype = summary["dtype"]
        kinds = {"int4": "int4, or int8 of attention", "int4_all": "int4"}.get(dtype, dtype)
        click.echo(f"rounding to {kinds}, against largest and root mean square value:")
    for name, error in summary["rounding_errors"].items():
        click.echo(f"  {name:29} {error['relative']:.2e}  {error['relative_rms']:.2e}")
    checksum = summary["checksum"]
    click.echo(f"{imported.checkpoint}: complete; checksums ({checksum}) in meta/metadata")
