"""`grok verify`."""

from collections import Counter
from typing import TYPE_CHECKING

import click

from grok.cli.tables import make_console, make_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from grok.weights.array_difference import ArrayDifference
    from grok.weights.source import Source
    from grok.weights.tools.checksums import ChecksumResult
    from grok.weights.tools.verify import Comparison

DIFFER = 1  # exit code
NAMED = 5  # layers or chunks of a tensor that are named


@click.command()
@click.argument("a")
@click.argument("b", required=False)
@click.option("--config", metavar="CONFIG", help="Preset or YAML file of the model that they hold.")
@click.option(
    "--tolerance",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Relative difference at which floats still count as equal; 0: every bit.",
)
@click.option(
    "--checksums",
    metavar="FILE",
    help="Compare the files of A with these SHA-256 checksums, as sha256sum writes them.",
)
@click.pass_context
def verify(
    ctx: click.Context,
    a: str,
    b: str | None,
    config: str | None,
    tolerance: float,
    checksums: str | None,
) -> None:
    """Compare the weights at A and B, or those at A with checksums: a checkpoint of grok with those
    of its save or import, every byte of it; any files with the published ones in a file.

    A and B, local or gs://, may be of any format and type: ckpt-0 folders, Hugging Face folders (or
    hf://ORG/NAME), checkpoints of grok. int8 is compared with floats by what it dequantises to,
    floats of two types by the coarser. Exit codes: 0 equal, 1 different, 2 cannot be compared.
    """
    from grok.config.load import load_config
    from grok.weights.detect import open_source
    from grok.weights.tools.verify import open_both

    model = load_config(config).model if config else None
    console = make_console()
    if checksums is not None:
        if b is not None:
            raise click.UsageError("--checksums is for the files of A alone; without B it works.")
        equal = _verify_published(console, a, checksums)
    elif b is None:
        equal = _verify_checksums(console, open_source(a, model))
    else:
        equal = _compare(console, *open_both(a, b, model), tolerance)
    differing, kind = equal.count(False), "tensors" if checksums is None else "files"
    click.echo(f"differ: {differing} of {len(equal)} {kind}" if differing else "equal")
    ctx.exit(DIFFER if differing else 0)


def _verify_checksums(console: "Console", source: "Source") -> list[bool]:
    from grok.progress import byte_progress
    from grok.weights.tools.checksums import verify_checkpoint

    with byte_progress() as on_progress:
        results = list(verify_checkpoint(source, on_progress))
    console.print(f"{source.path}  ({source.format}, {source.dtype})")
    return _print_results(console, "tensor", results)


def _verify_published(console: "Console", folder: str, file: str) -> list[bool]:
    from grok.progress import byte_progress
    from grok.weights.tools.checksums import read_published, verify_published

    published = read_published(file)
    with byte_progress() as on_progress:
        results = list(verify_published(folder, published, on_progress))
    console.print(f"{folder}  (SHA-256 of {file})")
    return _print_results(console, "file", results)


def _print_results(console: "Console", title: str, results: "list[ChecksumResult]") -> list[bool]:
    table = make_table(title, "checksums", "differ", right=2)
    for result in results:
        more = f" and {len(result.differing) - NAMED} more" if len(result.differing) > NAMED else ""
        differing = ", ".join(result.differing[:NAMED]) + more
        table.add_row(result.name, str(result.checksums), differing or "equal")
    return _print_table(console, table, results)


def _compare(console: "Console", a: "Source", b: "Source", tolerance: float) -> list[bool]:
    """Compares and prints; returns True for each tensor that is equal."""
    from grok.progress import byte_progress
    from grok.weights.tools.verify import compare

    with byte_progress() as on_progress:
        comparisons = list(compare(a, b, tolerance, on_progress))
    for letter, source in (("A", a), ("B", b)):
        console.print(f"{letter}  {source.path}  ({source.format}, {source.dtype})")
    for words, count in Counter(tensor.method.words for tensor in comparisons).items():
        console.print(f"   {count} tensors, {words}")
    if tolerance:
        console.print(f"   floats equal where they differ relatively by {tolerance:g} at most")
    titles = ["differ"]
    if not all(tensor.equal for tensor in comparisons):
        console.print("   largest: of |A - B|; relative: of |A - B| / max(|A|, |B|)")
        titles += ["largest", "relative"]
    if any(tensor.method.quantization and not tensor.equal for tensor in comparisons):
        console.print("   rms: root mean square of A - B over that of the floats")
        titles.append("rms")
    table = make_table("tensor", *titles, right=len(titles))
    for tensor in comparisons:
        _add_rows(table, tensor)
    return _print_table(console, table, comparisons)


def _print_table(console: "Console", table: "Table", results) -> list[bool]:
    console.print()
    console.print(table)
    console.print()
    return [tensor.equal for tensor in results]


def _add_rows(table: "Table", tensor: "Comparison") -> None:
    """Adds rows for the tensor and for scales that differ, each with its largest difference."""
    if tensor.equal:
        table.add_row(tensor.spec.name, "equal")
        return
    rms = [f"{tensor.values.relative_rms:.3g}"] if tensor.method.quantization else []
    table.add_row(tensor.spec.name, *_numbers(tensor.values), *rms)
    if tensor.values.differing:
        table.add_row(_position(*tensor.farthest()))
    if tensor.scales is not None and tensor.scales.differing:
        table.add_row("  scales", *_numbers(tensor.scales))
        table.add_row(_position(*tensor.farthest(of_scales=True)))


def _numbers(difference: "ArrayDifference") -> tuple[str, str, str]:
    if not difference.differing:
        return "0", "", ""
    largest, relative = difference.largest_absolute, difference.largest_relative
    return f"{difference.differing:,}", f"{largest:.3g}", f"{relative:.3g}"


def _position(layer: int | None, index: tuple[int, ...]) -> str:
    at = ",".join(map(str, index))
    return f"  at [{at}]" if layer is None else f"  at layer {layer} [{at}]"
