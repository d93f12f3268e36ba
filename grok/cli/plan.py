"""`grok plan`."""

import json
from pathlib import Path

import click

NOT_FITTING = 1


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--topology", metavar="SLICE", help="Slice, such as v5p:4x4x8. Default: the config's."
)
@click.option(
    "--slices",
    type=click.IntRange(1),
    help="Slices that the data-centre network joins; sets mesh.slice.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.option(
    "--dump", type=click.Path(path_type=Path), help="Write the compiled program's text here."
)
@click.option(
    "--save", type=click.Path(path_type=Path), help="Write the serialised executable here."
)
@click.option("--price", type=click.FloatRange(0), help="USD per chip-hour.")
@click.option(
    "--prices",
    type=click.Path(path_type=Path),
    help="File with prices by generation. Default: launch/prices.env.",
)
@click.option(
    "--search",
    type=click.IntRange(1),
    metavar="N",
    help="Compile the N most promising meshes, remat policies and batch sizes, and rank them.",
)
@click.pass_context
def plan(
    ctx: click.Context,
    config: str,
    overrides: tuple[str, ...],
    topology: str | None,
    slices: int | None,
    as_json: bool,
    dump: Path | None,
    save: Path | None,
    price: float | None,
    prices: Path | None,
    search: int | None,
) -> None:
    """Say what a step of CONFIG would do on a slice of TPUs, with none at hand.

    The step that plan.program names (train, prefill or decode) is compiled for the slice: does it
    fit, what does it compute and move, what bounds it, what does it cost. Exit code 1: it does not
    fit. A full-size program takes minutes.
    """
    from grok.config.load import load_config
    from grok.errors import ConfigError
    from grok.plan.compile import compile_plan
    from grok.plan.estimate import Price
    from grok.plan.format import report
    from grok.plan.prices import price_of, prices_file
    from grok.plan.search import candidates, ranking
    from grok.plan.topology import parse_slice
    from grok.progress import phase_progress

    if slices is not None:
        overrides = (*overrides, f"mesh.slice={slices}")
    checked = load_config(config, overrides)
    name = topology or checked.plan.topology
    if not name:
        raise ConfigError(
            f"{config} names no slice in plan.topology; --topology v5p:4x4x8 would work."
        )
    slice_ = parse_slice(name, max(1, checked.mesh.slice))
    paid = price_of(slice_.generation, prices or prices_file())
    if price is not None:
        paid = Price(price, "--price")

    if search is not None:
        if dump or save or as_json:
            raise ConfigError("--search compiles several programs; it prints a ranking, no files.")
        found = []
        for number, each in enumerate(candidates(checked, slice_)[:search], 1):
            with phase_progress(f"{number} of {search}: {each.describe()}") as on_phase:
                found.append((each, compile_plan(each.config, slice_, paid, on_phase)))
        click.echo(ranking(found))
        return
    with phase_progress(f"{checked.plan.program} step for {slice_}") as on_phase:
        planned = compile_plan(checked, slice_, paid, on_phase, dump, save)
    click.echo(json.dumps(planned.to_dict(), indent=2) if as_json else report(planned))
    if not planned.fits:
        ctx.exit(NOT_FITTING)
