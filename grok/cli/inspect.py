"""`grok inspect`."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from grok.cli.tables import make_console, make_table
from grok.errors import CheckpointError

if TYPE_CHECKING:
    from rich.console import Console

    from grok.weights.tools.diagnose import TensorSummary
    from grok.weights.tools.inspection import Inspection

FORMATS = {
    "xai": "xai (ckpt-0)",
    "huggingface": "huggingface (safetensors)",
    "orbax": "orbax (a checkpoint of grok)",
}


@click.command()
@click.argument("path")
@click.option("--config", metavar="CONFIG", help="Preset or YAML file of the model that it holds.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.pass_context
def inspect(ctx: click.Context, path: str, config: str | None, as_json: bool) -> None:
    """Show what weights are at PATH: tensors, sizes, config, and whether they are complete.

    PATH, local or gs://, is a ckpt-0 folder, a Hugging Face folder, or a checkpoint of grok. Only
    headers are read. The exit code is 2 where anything is missing or damaged.
    """
    from grok.config.load import load_config
    from grok.weights.tools.inspection import inspect as inspect_path

    found = inspect_path(path, load_config(config).model if config else None)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
    elif found.format is None:
        raise CheckpointError(found.problems[0])
    else:
        _print(make_console(), found)
    ctx.exit(CheckpointError.exit_code if found.problems else 0)


def _print(console: "Console", found: "Inspection") -> None:
    console.print(found.path, style="bold")
    for label, text in _summary(found):
        console.print(f"  {label:<12}{text}")
    for problem in found.problems:
        console.print(f"  {'problem':<12}{problem}", style="red")
    if found.tensors:
        table = make_table("tensor", "shape", "type", "bytes", right=1)
        for tensor in found.tensors:
            shape = "x".join(map(str, tensor.shape))
            table.add_row(tensor.name, shape, _kind(tensor), size(tensor.bytes))
        console.print()
        console.print(table)
    if found.config is not None:
        table = make_table("config", "value", "from")
        for name, origin in found.origins.items():
            table.add_row(name, str(getattr(found.config, name)), origin)
        console.print()
        console.print(table)


def _summary(found: "Inspection") -> Iterator[tuple[str, str]]:
    yield "format", FORMATS[str(found.format)]
    if found.tensors:
        partly = ", as far as they are there" if found.problems else ""
        kind = f"; matrices are {found.dtype}" if found.dtype else ""
        yield "weights", f"{len(found.tensors)} tensors{partly}{kind}"
        yield "size", f"{found.bytes:,} bytes ({size(found.bytes)})"
    if found.parameters is not None:
        active, without = found.parameters["active"], found.parameters["active_without_embedding"]
        yield "parameters", f"{found.parameters['total']:,}"
        yield "per token", f"{active:,}, without the embedding {without:,}"
        yield "preset", found.preset or "none is this config"
    for name in found.fitting:
        yield "", f"shapes are those of preset {name} (--config {name})"
    if found.step is not None:
        yield "step", str(found.step)
    if found.imported_from is not None:
        yield "imported", f"from {found.imported_from}, {found.checksums} checksums"
    if not found.problems:
        yield "complete", "yes"


def _kind(tensor: "TensorSummary") -> str:
    if tensor.groups is None:
        return tensor.dtype
    return f"{tensor.dtype}, {tensor.groups} group{'s' if tensor.groups > 1 else ''}"


def size(count: int) -> str:
    """A number of bytes for people."""
    number, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024 or unit == "TiB":
            break
        number /= 1024
    return f"{count} B" if unit == "B" else f"{number:.1f} {unit}"
