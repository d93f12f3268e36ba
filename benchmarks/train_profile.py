"""Splits the time of a training step on CPU by source file.

    python -m benchmarks.train_profile [--remat full] [--steps 3]

The model is that of train_against_maxtext.py. JAX's profiler traces the steps. The time that a
thread spends in an instruction, minus the time in nested instructions, is charged to the innermost
file of grok/ (except sharding/) that the instruction was traced in: experts are in moe.py.
"""

import argparse
import collections
import re
import tempfile
from pathlib import Path

import jax
from jax.profiler import ProfileData

from benchmarks.train_against_maxtext import prepared_step
from grok.hardware import configure_devices

NO_FILE = "waiting, and what has no file"


def main() -> None:
    """Traces the steps and prints the shares."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--remat", default="none")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    configure_devices(1)
    step, state, batch, mesh = prepared_step(options.remat)
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        compiled = step.lower(state, batch).compile()
        state, _ = jax.block_until_ready(compiled(state, batch))
        with jax.profiler.trace(folder):
            for _ in range(options.steps):
                state, _ = jax.block_until_ready(compiled(state, batch))
        times = seconds_of_instructions(Path(folder))
    files = files_of_instructions(compiled.as_text())
    shares: collections.Counter[str] = collections.Counter()
    for name, seconds in times.items():
        shares[files.get(name, NO_FILE)] += seconds
    for file, seconds in shares.most_common():
        print(f"{seconds / options.steps:7.2f} s  {seconds / shares.total():6.1%}  {file}")


def seconds_of_instructions(folder: Path) -> collections.Counter[str]:
    """Thread seconds that each instruction of the program took by itself."""
    seconds: collections.Counter[str] = collections.Counter()
    (trace,) = folder.rglob("*.xplane.pb")
    lines = [line for plane in ProfileData.from_file(str(trace)).planes for line in plane.lines]
    for line in lines:
        if "XLAEigen" not in (line.name or ""):
            continue
        open_until: list[tuple[float, str]] = []
        events = sorted((event.start_ns, -event.duration_ns, event.name) for event in line.events)
        for start, negative, name in events:
            while open_until and open_until[-1][0] <= start:
                open_until.pop()
            if open_until:
                seconds[open_until[-1][1]] += negative / 1e9
            seconds[name] -= negative / 1e9
            open_until.append((start - negative, name))
    return seconds


def files_of_instructions(text: str) -> dict[str, str]:
    """The innermost file of grok/ of each instruction, by the tables at the head of its text."""
    paths = dict(re.findall(r'^(\d+) "(.*)"$', text.split("FunctionNames")[0], flags=re.MULTILINE))
    locations = dict(re.findall(r"^(\d+) \{file_name_id=(\d+)", text, flags=re.MULTILINE))
    frames = re.findall(
        r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)", text, flags=re.MULTILINE
    )
    parents = {frame: (location, parent) for frame, location, parent in frames}

    def file_of(frame: str) -> str:
        while frame != "0":
            location, parent = parents[frame]
            path = paths[locations[location]]
            if "/grok/" in path and "/grok/sharding/" not in path:
                return "grok/" + path.rpartition("/grok/")[2]
            frame = str(int(parent) - 1)  # 1: none
        return "outside grok: the optimizer"

    of_computation: dict[str, str] = {}
    of_instruction: dict[str, str] = {}
    inside = ""
    for line in text.splitlines():
        if heading := re.match(r"%([\w.\-]+) \(.*\{$", line):
            inside = heading[1]
        named = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = ", line)
        if named is None:
            continue
        if frame := re.search(r"stack_frame_id=(\d+)", line):
            of_instruction[named[1]] = of_computation[inside] = file_of(frame[1])
        elif called := re.search(r"(?:calls|to_apply|body)=%([\w.\-]+)", line):
            of_instruction[named[1]] = of_computation.get(called[1], NO_FILE)
    return of_instruction


if __name__ == "__main__":
    main()
