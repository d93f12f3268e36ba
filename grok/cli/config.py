"""`grok config`: the whole resolved config, each key with its meaning."""

import os
import re
from typing import Any

import click

from grok.cli.completion import complete_config, overrides_argument
from grok.cli.options import COUNT


def _print_reference(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        from grok.config.text import reference

        click.echo(reference(), nl=False)
        ctx.exit()


@click.command()
@click.argument("config", shell_complete=complete_config("train"))
@overrides_argument("train")
@click.option(
    "--of",
    "command",
    type=click.Choice(["train", "batch", "serve"]),
    default="train",
    show_default=True,
    help="The command that CONFIG is for.",
)
@click.option(
    "--devices",
    type=COUNT,
    help="Check that the mesh fits so many devices, as on a slice.",
)
@click.option(
    "--hosts",
    type=COUNT,
    help="Hosts that --devices belong to: of a batch job each has a mesh, unless replica=all.",
)
@click.option(
    "--reference",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_reference,
    help="Print every key of all commands with values, default and meaning, as Markdown.",
)
def config(
    config: str,
    overrides: tuple[str, ...],
    command: str,
    devices: int | None,
    hosts: int | None,
) -> None:
    """Print every setting of CONFIG, a YAML file or a preset's name, as YAML.

    KEY=VALUE sets one key, as in train.steps=50. The output is itself a config file."""
    from grok.config import check_trainable
    from grok.config.batch import load_batch_config
    from grok.config.load import load_config
    from grok.config.serve import load_serve_config
    from grok.config.text import to_yaml

    if hosts and not (devices and command == "batch"):
        raise click.UsageError("--hosts is of batch jobs, beside --of batch --devices N.")
    load: dict[str, Any] = {"batch": load_batch_config, "serve": load_serve_config}
    resolved: Any = load.get(command, load_config)(config, overrides)
    text = to_yaml(resolved)
    if command == "train":
        from grok.model.mesh_fit import check_fits
        from grok.model.params import num_active_parameters, num_parameters

        if devices and resolved.plan.program == "train":
            check_trainable(resolved)
        if devices := devices or resolved.mesh.simulated_devices:
            check_fits(resolved, devices)
        total, active = num_parameters(resolved.model), num_active_parameters(resolved.model)
        text += f"# {total:,} parameters, {active:,} active per token\n"
    elif devices:
        from grok.config.mesh import num_devices_of, resolve_mesh
        from grok.model.mesh_fit import fit_mesh

        if command == "batch" and resolved.replica == "host":
            devices = num_devices_of(resolved.mesh, devices // (hosts or 1))
        if resolved.model:
            fit_mesh(resolved.mesh, devices, load_config(resolved.model).model)
        else:  # the weights say what the model is
            resolve_mesh(resolved.mesh, devices)
    dimmed = re.sub(r"# .*$", lambda comment: click.style(comment[0], dim=True), text, flags=re.M)
    # Styles are dropped where the output is no terminal.
    click.echo(dimmed, nl=False, color=False if os.environ.get("NO_COLOR") else None)
