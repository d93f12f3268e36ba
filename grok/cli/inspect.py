"""`grok inspect`."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from grok.cli.options import PATH
from grok.cli.tables import make_console, make_table
from grok.errors import CheckpointError

if TYPE_CHECKING:
    from rich.console import Console

    from grok.weights.tools.inspection import Inspection

FORMATS = {
    "xai": "xai (ckpt-0)",
    "huggingface": "huggingface (safetensors)",
    "orbax": "orbax (a checkpoint of grok)",
}


@click.command()
@click.argument("path", type=PATH)
@click.option("--config", metavar="CONFIG", help="Preset or YAML file of the model that it holds.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.pass_context
def inspect(ctx: click.Context, path: str, config: str | None, as_json: bool) -> None:
    """Show what weights are at PATH: tensors, sizes, config, and whether they are complete.

    PATH, local or gs://, is a ckpt-0 folder, a Hugging Face folder (or hf://ORG/NAME), or a
    checkpoint of grok. Only headers are read. The exit code is 2 where anything is missing or
    damaged.
    """
    from grok.config.load import load_config
    from grok.weights.tools.inspection import inspect as inspect_path

    inspection = inspect_path(path, load_config(config).model if config else None)
    if as_json:
        click.echo(json.dumps(inspection.to_dict(), indent=2))
    elif inspection.format is None:
        raise CheckpointError(inspection.problems[0])
    else:
        _print(make_console(), inspection)
    ctx.exit(CheckpointError.exit_code if inspection.problems else 0)


def _print(console: "Console", inspection: "Inspection") -> None:
    from grok.config.text import as_yaml
    from grok.weights.tools.verify import config_values

    console.print(inspection.path, style="bold")
    for label, text in _summary(inspection):
        console.print(f"  {label:<12}{text}")
    for problem in inspection.problems:
        console.print(f"  {'problem':<12}{problem}", style="red")
    tables = []
    if inspection.tensors:
        tables.append(make_table("tensor", "shape", "type", "bytes", right=1))
        for tensor in inspection.tensors:
            groups = f", {tensor.groups} group{'s' * (tensor.groups > 1)}" if tensor.groups else ""
            shape = "x".join(map(str, tensor.shape))
            tables[-1].add_row(tensor.name, shape, tensor.dtype + groups, size(tensor.bytes))
    if inspection.config is not None:
        tables.append(make_table("config", "value", "from"))
        values = config_values(inspection.config)
        for name, origin in inspection.origins.items():
            tables[-1].add_row(name, as_yaml(values[name]), origin)
    for table in tables:
        console.print()
        console.print(table)


def _summary(inspection: "Inspection") -> Iterator[tuple[str, str]]:
    yield "format", FORMATS[str(inspection.format)]
    if inspection.tensors:
        partly = ", as far as they are there" if inspection.problems else ""
        kind = f"; matrices are {inspection.dtype}" if inspection.dtype else ""
        yield "weights", f"{len(inspection.tensors)} tensors{partly}{kind}"
        yield "size", f"{inspection.bytes:,} bytes ({size(inspection.bytes)})"
    if inspection.parameters is not None:
        counts = inspection.parameters
        yield "parameters", f"{counts['total']:,}"
        without = counts["active_without_embedding"]
        yield "per token", f"{counts['active']:,}, without the embedding {without:,}"
        yield "preset", inspection.preset or "none is this config"
    for name in inspection.fitting:
        yield "", f"shapes are those of preset {name} (--config {name})"
    if inspection.step is not None:
        yield "step", str(inspection.step)
    for label, text in (("origin", inspection.origin), ("LoRA", inspection.adapters)):
        if text is not None:
            yield label, text
    if inspection.imported_from is not None:
        yield "imported", f"from {inspection.imported_from}, {inspection.checksums} checksums"
    if not inspection.problems:
        yield "complete", "yes"


def size(count: int) -> str:
    """A number of bytes for people."""
    power = max(0, min(4, (count.bit_length() - 1) // 10))
    units = ("KiB", "MiB", "GiB", "TiB")
    return f"{count / 1024**power:.1f} {units[power - 1]}" if power else f"{count} B"
