"""Compiles every kernel of the experts alone, ahead of time, for each TPU generation and width.

    python -m benchmarks.kernel_sweep --out benchmarks/results/kernel-widths.md
    python -m benchmarks.kernel_sweep --chip v5p --embed 6144 --width 14336
    python -m benchmarks.kernel_sweep --kernel int8 --kernel int4

It needs libtpu, no TPU: seconds a kernel. Kernels are those of a training step, forward and
backward, in bfloat16 and in 8 bits (`--kernel scaled`), and of a serving step with int8 and int4
weights and bfloat16 or int8 activations (`--kernel W8A8`, `W4A8`), for 64 and for 16384 rows.
Kernels of equal blocks are compiled once. The table says how many compile, and which do not, with
the compiler's words. Results are kept beside `--out` as JSON lines, and what is there is not
compiled again. Exits with 1 if a kernel is refused.
"""

import os

from grok.plan.compile import ENVIRONMENT

os.environ.update(ENVIRONMENT)

import argparse
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from benchmarks.kernel_cases import Case, kernels
from grok import sharding
from grok.hardware import CHIPS
from grok.plan.compile_process import topology_devices
from grok.plan.topology import Slice

WIDTHS = (1024, 2048, 4096, 8192, 14336, 16384, 32768)  # of an expert on one chip
EMBEDS = (2048, 4096, 6144, 8192)
ROWS = (64, 16384)  # of a decode step, and of training: enough for tiles of the largest height
VERDICTS: dict[tuple, str] = {}  # by chip and blocks


def main() -> int:
    """Compiles what is asked for and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", action="append", choices=CHIPS)
    for name, values in (("embed", EMBEDS), ("width", WIDTHS), ("rows", ROWS)):
        parser.add_argument(f"--{name}", action="append", type=int, help=f"default: {values}")
    parser.add_argument("--kernel", action="append", help="only those whose name begins so")
    parser.add_argument("--out", type=Path, help="file for the table")
    options = parser.parse_args()
    cases = itertools.product(
        options.chip or CHIPS,
        options.embed or EMBEDS,
        options.width or WIDTHS,
        options.rows or ROWS,
    )
    log = options.out and options.out.with_suffix(".jsonl")
    results = read_results(log)
    for case in itertools.starmap(Case, cases):
        names = [
            name
            for name in kernels(case, max(ROWS) == case.rows)
            if name not in results.get(case, {}) and name.startswith(tuple(options.kernel or [""]))
        ]
        if names:
            new = refusals(case, names)
            results[case] = results.get(case, {}) | new
            print(json.dumps([*case, new]), flush=True)
            if log:
                with log.open("a") as file:
                    print(json.dumps([*case, new]), file=file)
    if options.out:
        options.out.write_text(table(results))
    print(table(results))
    return int(any(any(result.values()) for result in results.values()))


def read_results(log: Path | None) -> dict[Case, dict[str, str]]:
    """Results of earlier runs."""
    if log is None or not log.exists():
        return {}
    results: dict[Case, dict[str, str]] = {}
    for *case, result in map(json.loads, log.read_text().splitlines()):
        results[Case(*case)] = results.get(Case(*case), {}) | result
    return results


def refusals(case: Case, names: list[str]) -> dict[str, str]:
    """The compiler's refusal of each of these kernels; empty where it compiles."""
    sides = (2,) * CHIPS[case.chip].dimensions
    device = topology_devices(Slice(case.chip, sides))[0]
    with jax.set_mesh(sharding.make_mesh(devices=[device])):
        cases = kernels(case, max(ROWS) == case.rows)
        return {name: refusal(case.chip, *cases[name]) for name in names}


def refusal(chip: str, function: Callable, arguments: tuple) -> str:
    """The compiler's reason not to compile; empty if it does."""
    traced = jax.jit(function).trace(*arguments)
    key = chip, *blocks(traced.jaxpr.jaxpr)
    if key not in VERDICTS:
        VERDICTS[key] = ""
        try:
            traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            VERDICTS[key] = short_reason(str(error))
    return VERDICTS[key]


def blocks(jaxpr) -> Iterator[str]:
    """Kernels as the compiler sees them: their bodies, blocks and limits, not whole arrays."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            mapping = eqn.params["grid_mapping"]
            blocks_of_arrays = [(m.block_shape, m.pipeline_mode) for m in mapping.block_mappings]
            yield f"{eqn.params['jaxpr']} {blocks_of_arrays} {eqn.params['compiler_params']}"
        else:
            for inner in (getattr(value, "jaxpr", None) for value in eqn.params.values()):
                yield from () if inner is None else blocks(inner)


def short_reason(message: str) -> str:
    """The sizes in the message, or its beginning."""
    sizes = re.search(r"(?:Used|with size|\(size=)\s*([\d.]+\w*).{0,40}?([\d.]+[MG])", message)
    return " of ".join(sizes.groups()) if sizes else message[:80].replace("\n", " ")


def table(results: dict[Case, dict[str, str]]) -> str:
    """Results by chip and width, in Markdown."""
    chips, embeds = {case.chip for case in results}, sorted({case.embed for case in results})
    lines = [
        "# Kernels of the experts at many widths",
        "",
        f"Chips that were tried: {', '.join(name for name in CHIPS if name in chips)}. No others.",
        "Kernels that compile ahead of time, each alone, of those tried:",
        f"for {ROWS[0]} rows those of serving, in bfloat16, int8 and int4, for {ROWS[1]} also",
        "those of training; in 8 bits where a chip has a rate of them.",
        f"jax {jax.__version__}; made by",
        "`python -m benchmarks.kernel_sweep --out benchmarks/results/kernel-widths.md`.",
        "",
        "| chip | width | " + " | ".join(f"embed {embed}" for embed in embeds) + " |",
        "|---|---|" + "---|" * len(embeds),
    ]
    groups = sorted({(list(CHIPS).index(case.chip), case.width) for case in results})
    for chip, width in groups:
        cells = []
        for embed in embeds:
            key = list(CHIPS)[chip], embed, width
            tried = {case.rows: results[case] for case in results if case[:3] == key}
            cells.append(cell(tried))
        lines.append(f"| {list(CHIPS)[chip]} | {width} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cell(tried: dict[int, dict[str, str]]) -> str:
    """Kernels that compile, of how many, and the others."""
    verdicts = [
        (rows, *verdict) for rows, result in sorted(tried.items()) for verdict in result.items()
    ]
    refused = [f"{name}, {rows} rows: {reason}" for rows, name, reason in verdicts if reason]
    return "; ".join([f"{len(verdicts) - len(refused)} of {len(verdicts)}", *refused])


if __name__ == "__main__":
    sys.exit(main())
