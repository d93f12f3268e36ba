"""Plans of presets as sentences for their head comments and as rows of docs/plan.md.

Each preset is compiled for its slice, which takes minutes for a full-size model. With `--write` the
sentence takes the place of the one in the preset's file.

    python -m benchmarks.plan_presets train-v5p-4x4x8 decode-v6e-4x4
    python -m benchmarks.plan_presets --write
"""

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from grok.plan.format import amount

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def main() -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("presets", nargs="*", help="default: all that name a slice")
    parser.add_argument("--write", action="store_true", help="replace the sentences in the files")
    asked = parser.parse_args()
    for name in asked.presets or slices():
        plan = compile_preset(name)
        text = sentence(name, plan)
        print(f"{text}\n{row(name, plan)}\n", flush=True)
        if asked.write:
            write(name, text)


def slices() -> list[str]:
    """Names of the presets that are for a slice."""
    files = sorted(CONFIGS.glob("*/*.yaml"))
    return [file.stem for file in files if re.search(r"^  topology: ", file.read_text(), re.M)]


def compile_preset(name: str) -> dict[str, Any]:
    """The JSON of `grok plan`."""
    command = [sys.executable, "-m", "grok", "plan", name, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if not done.stdout:
        sys.exit(f"grok plan {name} ended with exit code {done.returncode}.")
    return json.loads(done.stdout)


def sentence(name: str, plan: dict[str, Any]) -> str:
    """The figures in words."""
    versions = ", ".join(f"{lib} {importlib.metadata.version(lib)}" for lib in ("jax", "libtpu"))
    memory, flops = plan["hbm_gib_per_chip"], plan["flops_per_chip_per_step"]
    text = f"`grok plan {name}` ({versions}): {memory['state']:.1f} GiB of state and a peak of "
    text += f"{memory['total']:.1f} of {memory['capacity']:.0f} GiB per chip; "
    if name.startswith("train"):
        text += f"{amount(flops['compiled'], 3)}FLOP compiled, "
        text += f"{flops['compiled'] / flops['model']:.2f}x the model's own; "
    text += f"{amount(plan['hbm_bytes_per_chip_per_step'], 3)}B of HBM traffic and "
    text += (
        f"{amount(sent(plan), 3)}B between chips, {plan['async_collective_share'] or 0:.0%} of it "
    )
    text += "beside other work. A step takes "
    endings = {
        "scheduled": "by its schedule",
        "overlapped": "if everything overlaps",
        "serial": "if nothing does",
    }
    return f"{text}{', '.join(step(plan, *ending) for ending in endings.items())}."


def step(plan: dict[str, Any], name: str, how: str) -> str:
    """The time of a step, and what follows from it."""
    seconds, rate = plan["seconds"][name], plan["tokens_per_second_per_chip"][name]
    time = f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
    return f"{time} {how} ({rate:.4g} tokens/s/chip, MFU {plan['mfu'][name]:.1%})"


def row(name: str, plan: dict[str, Any]) -> str:
    """A row of the tables in docs/plan.md and README.md."""
    memory, rates, mfu = (
        plan[key] for key in ("hbm_gib_per_chip", "tokens_per_second_per_chip", "mfu")
    )
    size = f"{memory['total']:.1f} of {memory['capacity']:.0f}"
    speeds = f"**{rates['scheduled']:.0f}** ({rates['serial']:.0f} to {rates['overlapped']:.0f})"
    shares = f"**{mfu['scheduled']:.0%}** ({mfu['serial']:.0%} to {mfu['overlapped']:.0%})"
    return f"| {name} | {size} | {speeds} | {shares} |"


def sent(plan: dict[str, Any]) -> float:
    """Bytes that a chip sends in a step."""
    return sum(sum(kinds.values()) for kinds in plan["collective_bytes_per_chip_per_step"].values())


def write(name: str, text: str) -> None:
    """Replaces the sentences in the preset's head comment, up to the one on what nothing overlaps
    with; what follows them stays."""
    (file,) = CONFIGS.glob(f"*/{name}.yaml")
    lines = file.read_text().splitlines()
    head = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    opening = re.compile(r"# (`grok plan [^`]*`|The plan) \(jax ")
    first = next((i for i in range(head) if opening.match(lines[i])), None)
    if first is None:
        sys.exit(f"{file} has no line that begins with `grok plan {name}` (jax VERSION.")
    old = " ".join(line.removeprefix("# ") for line in lines[first:head])
    rest = re.split(r"if nothing does(?: \([^)]*\))?\.", old, maxsplit=1)[-1]
    wrapper = textwrap.TextWrapper(
        100, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
    )
    comment = wrapper.fill(text + rest)
    file.write_text("\n".join([*lines[:first], comment, *lines[head:], ""]))


if __name__ == "__main__":
    main()
