"""`grok plan`: a step compiled and estimated for a slice of TPUs."""

import json
from pathlib import Path
from typing import Any

import click

from grok.cli.completion import complete_config, overrides_argument
from grok.cli.options import COUNT, HomePath

FILE = HomePath(path_type=Path)


@click.command()
@click.argument("config", shell_complete=complete_config("train"))
@overrides_argument("train")
@click.option(
    "--topology",
    metavar="SLICE",
    help="TPU slice, such as v5p:4x4x8. Default: plan.topology of the config.",
)
@click.option("--slices", type=COUNT, help="Slices joined by the network; sets mesh.slice.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option("--dump", type=FILE, help="File for the text of the compiled program.")
@click.option("--save", type=FILE, help="File for the serialised executable.")
@click.option("--price", type=click.FloatRange(0), help="USD per chip-hour.")
@click.option("--prices", type=FILE, help="Prices by generation. Default: launch/prices.env.")
@click.option(
    "--calibration",
    metavar="FILE",
    help="File of `grok calibrate`, here or at gs://: plan with the rates that it measured. One of "
    "a CPU or GPU plans the step on the devices here.",
)
@click.option(
    "--storage-bandwidth",
    type=click.FloatRange(0, min_open=True),
    metavar="GB/S",
    help="Between a host and the storage of checkpoints. Default: 1, assumed in November 2026.",
)
@click.option(
    "--search",
    type=COUNT,
    metavar="N",
    help="Compile the N most promising meshes, remat policies and batch sizes, and rank them.",
)
@click.pass_context
def plan(
    ctx,
    config,
    overrides,
    topology,
    slices,
    as_json,
    dump,
    save,
    price,
    prices,
    calibration,
    storage_bandwidth,
    search,
):
    """Compile a step of CONFIG for a slice of TPUs, without one, and estimate it.

    plan.program names the step: train, prefill or decode. Does it fit, what does it compute and
    move, what bounds it, what does it cost? Exit code 1: it does not fit. A full-size program takes
    minutes."""
    from grok.config.load import load_config
    from grok.errors import ConfigError
    from grok.plan.calibration import read_calibration
    from grok.plan.compile import compile_plan
    from grok.plan.estimate import Price, price_of
    from grok.plan.presets import slice_presets
    from grok.plan.saves import saves_of
    from grok.plan.search import candidates, ranking
    from grok.plan.topology import parse_slice
    from grok.progress import phase_progress

    if price is not None and prices is not None:
        raise ConfigError("--price and --prices are given; leave out one of them.")
    if slices is not None:
        overrides = (*overrides, f"mesh.slice={slices}")
    run = load_config(config, overrides)
    topology = topology or run.plan.topology
    measured = None if calibration is None else read_calibration(calibration)
    if not topology and measured is not None and not measured.is_tpu:
        if search or dump or save or prices or storage_bandwidth:
            options = "--search, --dump, --save, --prices and --storage-bandwidth"
            raise ConfigError(f"{options} are of TPU slices; --topology names one.")
        from grok.plan.local import plan_calibrated

        with phase_progress(f"{run.plan.program} step here") as on_phase:
            given_price = None if price is None else Price(price, "--price")
            local = plan_calibrated(run, measured, given_price, on_phase)
        _print_plan(ctx, local, None, as_json)
        return
    if not topology:
        made = [f"{name} ({of.plan.topology})" for name, of in slice_presets(run).items()]
        right = " would work" + (f", and so would {', '.join(made)}" if made else "")
        problem = f"{config} names no slice in plan.topology"
        raise ConfigError(f"{problem}; --topology v5p:4x4x8{right}.")
    slice_ = parse_slice(topology, max(1, run.mesh.slice))
    chip_price = price_of(slice_.generation, prices) if price is None else Price(price, "--price")

    if search is not None:
        if dump or save or as_json or storage_bandwidth:
            options = "--dump, --save, --json and --storage-bandwidth"
            raise ConfigError(
                f"--search prints a ranking of several programs; leave out {options}."
            )
        plans = []
        for i, candidate in enumerate(candidates(run, slice_)[:search], 1):
            with phase_progress(f"{i} of {search}: {candidate}") as on_phase:
                compiled = compile_plan(
                    candidate.config, slice_, chip_price, on_phase, calibration=measured
                )
            plans.append((candidate, compiled))
        click.echo(ranking(plans))
        return
    with phase_progress(f"{run.plan.program} step for {slice_}") as on_phase:
        plan = compile_plan(run, slice_, chip_price, on_phase, dump, save, measured)
    saves = saves_of(plan, storage_bandwidth and storage_bandwidth * 1e9)
    _print_plan(ctx, plan, saves, as_json)


def _print_plan(ctx: click.Context, plan: Any, saves: Any, as_json: bool) -> None:
    from grok.plan.format import format_plan

    if as_json:
        figures = plan.to_dict() | {"checkpoint": saves and saves.to_dict()}
        click.echo(json.dumps(figures, indent=2))
    else:
        click.echo(format_plan(plan, saves))
    if not plan.fits:
        ctx.exit(1)
