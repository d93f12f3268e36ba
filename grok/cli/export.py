"""`grok export`."""

import re
from collections.abc import Callable

import click

from grok.cli.groups import Group
from grok.cli.import_ import print_import, tokenizer_of
from grok.cli.options import PATH

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@click.group(cls=Group)
def export() -> None:
    """Write weights in a format of other programs."""


def size_in_bytes(ctx: click.Context, param: click.Parameter, text: str | None) -> int | None:
    """The value of an option such as 500MB; 1 MB is 10^6 bytes."""
    if text is None:
        return None
    size = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?) *([KMGT]?)B?", text.strip().upper())
    if not size:
        raise click.BadParameter(f"{text} is no size such as 5GB or 500MB.")
    if (nbytes := int(float(size[1]) * UNITS[size[2]])) >= 2**63:
        raise click.BadParameter(f"{text} is more than any file has; 500MB would do.")
    return nbytes


def paths_and_config(command: Callable) -> Callable:
    """Adds SRC, DST and --config to an export of weights."""
    config_help = "Preset or YAML file of the model that SRC holds."
    for decorate in (
        click.option("--config", metavar="CONFIG", help=config_help),
        click.argument("dst", type=PATH),
        click.argument("src", type=PATH),
    ):
        command = decorate(command)
    return command


@export.command()
@paths_and_config
@click.option(
    "--dtype",
    default="bfloat16",
    show_default=True,
    type=click.Choice(["bfloat16", "float16", "float32", "int4", "int4_all"]),
    help="Type of all tensors; with int4, of the matrices of MLP and experts, and with int4_all "
    "of attention's too, as vLLM and compressed-tensors read them; all else is then bfloat16.",
)
@click.option(
    "--family",
    metavar="NAME",
    help="Family whose layout is written: grok-1, grok-2, llama, mistral or mixtral.  [default: "
    "that of SRC, or the first that can hold the model]",
)
@click.option(
    "--shard-size",
    callback=size_in_bytes,
    help="Largest size of a file; 1 GB is 10^9 bytes. Grok-2's files have sizes of their own.  "
    "[default: 5GB]",
)
@click.option("--base-weights", metavar="TEXT", help="Where the weights came from, for README.md.")
@click.option("--data-manifest", type=PATH, metavar="FILE", help="File on the data, to be copied.")
@click.option(
    "--licence",
    metavar="ID",
    help="Licence of the weights, as the hub calls it, such as mit.  [default: that of a known "
    "release they came from]",
)
@click.option(
    "--tokenizer",
    type=PATH,
    metavar="FILE",
    help="Tokenizer to go with the weights, or a folder with one.  [default: SRC's]",
)
@click.option("--push", "repo", metavar="ORG/NAME", help="Model on the hub to upload DST to.")
@click.option("--public", is_flag=True, help="With --push: make a model that everyone may read.")
def hf(src, dst, repo, public, tokenizer, **options) -> None:
    """Write the weights at SRC to the Hugging Face folder DST, in the layout of their family.

    The model says which layout can hold it: that of hpcai-tech/grok-1, of Grok-2's release, or of
    transformers for Llama, Mistral and Mixtral. SRC, local or gs://, is a ckpt-0 folder, a Hugging
    Face folder (or hf://ORG/NAME), or a checkpoint of grok. After an interruption the same command
    continues with the unfinished files, and with --push, the unfinished upload.
    """
    if public and not repo:
        raise click.UsageError("--public says who may read what --push uploads; it needs --push.")
    from grok.config.load import load_config
    from grok.data.tokenizers.files import folders_beside
    from grok.weights.detect import open_source
    from grok.weights.huggingface.push import check_name, is_exported, push

    if repo:
        check_name(repo)
    config = options.pop("config")
    source = open_source(src, load_config(config).model if config else None)
    pieces = tokenizer_of(tokenizer, folders_beside(src), source.config.vocab_size)
    if not (repo and is_exported(source, dst, options["dtype"], options["family"])):
        _export_hf(source, dst, pieces, **options)
    click.echo(f"{dst}: complete; README.md says what can read it")
    if repo:
        click.echo(f"{push(dst, repo, public)}: uploaded")


def _export_hf(
    source, dst, pieces, dtype, family, shard_size, base_weights, data_manifest, licence
) -> None:
    from grok.data.tokenizers import config_ids
    from grok.progress import byte_progress
    from grok.weights.huggingface.export import ExportedTokenizer, export_huggingface

    tokenizer = ExportedTokenizer()
    if pieces:
        contents = _hub_files(pieces, source.config.context_length)
        tokenizer = ExportedTokenizer(contents, config_ids(pieces))
    with byte_progress() as on_progress:
        exported = export_huggingface(
            source,
            dst,
            dtype,
            shard_size,
            base_weights,
            data_manifest,
            on_progress,
            family,
            tokenizer,
            licence,
        )
    files = f"{exported.files:,} file{'' if exported.files == 1 else 's'}"
    if exported.files_resumed:
        files += f", {exported.files_resumed:,} from an interrupted export"
    click.echo(f"{exported.tensors:,} tensors, {exported.nbytes:,} bytes, in {files}")
    rate = exported.written / exported.seconds / 1e9
    written = f"{exported.written:,} bytes written in {exported.seconds:.1f} s, {rate:.2f} GB/s"
    click.echo(f"{written}, in the layout of {exported.family}")


def _hub_files(pieces, context_length: int) -> dict[str, bytes]:
    """The files of a tokenizer, with the chat template that commands use with it."""
    from grok.data.chat.encoder import ChatEncoder
    from grok.data.chat.template import find_template
    from grok.data.tokenizers.hub_files import hub_files

    template = find_template("", pieces)
    if template is None:
        return hub_files(pieces, context_length)
    ends = ChatEncoder(template, pieces).answers.end_ids
    return hub_files(pieces, context_length, template.text, ends)


@export.command()
@paths_and_config
@click.option(
    "--dtype",
    default="bfloat16",
    show_default=True,
    type=click.Choice(["bfloat16", "float16", "float32", "q8_0", "q4_0"]),
    help="Type of the matrices; q8_0 is int8 with a scale for every 32 values; with q4_0 those of "
    "MLP and experts are int4, all others q8_0.",
)
@click.option("--family", metavar="NAME", help="Family to write it as, as of `grok export hf`.")
@click.option("--base-weights", metavar="TEXT", help="Where the weights came from.")
@click.option(
    "--tokenizer",
    type=PATH,
    metavar="FILE",
    help="Tokenizer to go with the weights, or a folder with one.  [default: SRC's]",
)
@click.option(
    "--without-tokenizer", is_flag=True, help="Leave it out: programs then need token ids."
)
def gguf(src, dst, config, tokenizer, without_tokenizer, **options) -> None:
    """Write the weights at SRC to the file DST in llama.cpp's format, GGUF.

    Grok-1, Llama, Mistral and Mixtral are architectures that llama.cpp computes as grok does; a
    model of another form is refused. The tokenizer and its chat template are in the file.
    """
    if without_tokenizer and tokenizer:
        raise click.UsageError("--without-tokenizer leaves out what --tokenizer names; drop one.")
    from grok.config.load import load_config
    from grok.data.tokenizers.files import folders_beside
    from grok.data.tokenizers.gguf import gguf_keys
    from grok.progress import byte_progress
    from grok.weights.detect import open_source
    from grok.weights.gguf.export import NO_TOKENIZER, export_gguf

    source = open_source(src, load_config(config).model if config else None)
    vocab_size, keys = source.config.vocab_size, NO_TOKENIZER
    pieces = None
    if not without_tokenizer:
        pieces = tokenizer_of(tokenizer, folders_beside(src), vocab_size)
    if pieces:
        keys = gguf_keys(pieces, vocab_size)
    with byte_progress() as on_progress:
        exported = export_gguf(source, dst, tokenizer=keys, on_progress=on_progress, **options)
    click.echo(
        f"{exported.tensors:,} tensors, {exported.nbytes:,} bytes, written in "
        f"{exported.seconds:.1f} s as llama.cpp's {exported.architecture} ({exported.family})"
    )
    if exported.context_length < source.config.context_length:
        click.echo(
            f"the file states a context of {exported.context_length:,} tokens, the model's sliding "
            "window, beyond which llama.cpp would attend to everything"
        )
    if pieces is None:
        click.echo("there is no tokenizer in the file; programs need token ids")
    click.echo(f"{dst}: complete")


@export.command()
@click.argument("src", type=PATH)
@click.argument("dst", type=PATH)
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Type of the adapters.",
)
@click.option("--family", metavar="NAME", help="Family whose names are used, as in export hf.")
@click.option(
    "--base-weights",
    metavar="NAME",
    help="Weights that readers are to load, such as ORG/NAME.  [default: those of the run]",
)
def peft(src, dst, dtype, family, base_weights) -> None:
    """Write the adapters of the LoRA run at SRC, without its base weights, to the new folder DST.

    DST has adapter_config.json and adapter_model.safetensors, which the peft library adds to a
    model of the family. SRC, local or gs://, is a run's folder, of which the newest checkpoint is
    taken, or a step in its `checkpoints`.
    """
    from grok.weights.huggingface.peft import export_peft

    exported = export_peft(src, dst, dtype, base_weights, family)
    click.echo(
        f"{exported.tensors:,} tensors, {exported.parameters:,} parameters, "
        f"{exported.nbytes:,} bytes, under the names of {exported.family}"
    )
    click.echo(f"{dst}: complete")


@export.command()
@click.argument("src", type=PATH)
@click.argument("dst", type=PATH)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32", "int8", "int4", "int4_all"]),
    help="Type of the matrices; with int8 all else is float32; with int4 those of attention are "
    "int8, with int4_all they are int4 too.  [default: as they are]",
)
def params(src, dst, dtype) -> None:
    """Write the parameters of the run at SRC, without the optimizer's state, to the new folder DST.

    SRC, local or gs://, is a run's folder, of which the newest checkpoint is taken, or a step in
    its `checkpoints`. DST is then the folder of a run that all commands read. After an
    interruption the same command continues.
    """
    from grok.data.tokenizers.files import (
        find_tokenizer_file,
        folders_beside,
        read_tokenizer_files,
    )
    from grok.progress import byte_progress
    from grok.weights.importing.importer import export_params

    file = find_tokenizer_file(folders_beside(src))
    tokenizer = read_tokenizer_files(file).contents() if file else {}
    with byte_progress() as on_progress:
        exported = export_params(src, dst, dtype, tokenizer, on_progress)
    print_import(exported)
