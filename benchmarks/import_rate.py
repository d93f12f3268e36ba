"""Times `grok import` of full-width layers against `cp`, and kills and resumes it.

    python -m benchmarks.import_rate --layers 1

Writes a ckpt-0 folder of Grok-1's widths with random weights, then alternately copies and imports
it, with the files in the page cache and without. Every turn starts with nothing left to flush to
disk, and the fastest of each kind counts. Then an import is killed by SIGKILL when half of its
bytes are written, the same command resumes it, and all checksums are recomputed from disk.

One layer needs 17 GB of disk, two layers 27 GB, all freed at the end. Prints a table and a line of
JSON.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from grok.config import ModelConfig, RunConfig
from grok.config.load import load_config
from grok.config.text import to_yaml
from grok.weights.checksums import piece_checksum
from grok.weights.orbax.source import OrbaxSource
from grok.weights.source import layer_pieces
from tests.fixtures.random_weights import RandomSource
from tests.fixtures.release_writer import write_release


@dataclasses.dataclass(frozen=True)
class Turn:
    """A process that ended: seconds, those of processors, its largest resident memory, and bytes
    read from disk.

    Of an import, `inner` is the seconds that it reports, without the start of Python; `written` is
    the bytes that it wrote.
    """

    what: str
    seconds: float
    cpu: float
    peak: int
    from_disk: int
    inner: float
    written: int


def run(what: str, command: list[str], kill_at: tuple[Path, int] | None = None) -> Turn:
    """Runs a command; with (folder, bytes), kills it when so many are in the folder."""
    os.sync()
    begin = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdout=out)
        while kill_at and size(kill_at[0]) < kill_at[1]:
            time.sleep(0.02)
        if kill_at:
            process.kill()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - begin
        out.seek(0)
        text = out.read().decode()
    if process.returncode != (-9 if kill_at else 0):
        raise SystemExit(f"{' '.join(command)} left with {process.returncode}")
    match = re.search(r"([\d,]+) bytes written in ([\d.]+) s", text)
    written, inner = (int(match[1].replace(",", "")), float(match[2])) if match else (0, seconds)
    cpu, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
    return Turn(what, seconds, cpu, peak, usage.ru_inblock * 512, inner, written)


def size(folder: Path) -> int:
    """Bytes of the files in a folder; some may vanish meanwhile."""
    total = 0
    for path, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.path.getsize(os.path.join(path, name))
            except FileNotFoundError:
                continue
    return total


def cache(folder: Path, warm: bool) -> None:
    """Brings the files of a folder into the page cache, or drops them from it."""
    os.sync()
    for file in folder.iterdir():
        with open(file, "rb", buffering=0) as opened:
            if not warm:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while warm and opened.read(1 << 24):
                pass


def make_release(model: ModelConfig, folder: Path) -> None:
    """A ckpt-0 folder with random weights."""
    write_release(RandomSource(model), folder)


def measure(folder: Path, layers: int, dtype: str, rounds: int) -> dict:
    """All turns in `folder`, and the figures."""
    model = dataclasses.replace(load_config("grok-1").model, num_layers=layers)
    config, release, copy, imported = (folder / n for n in ("c.yaml", "ckpt-0", "copy", "run"))
    config.write_text(to_yaml(RunConfig(model=model)))
    # In a process of its own, whose memory would otherwise count as that of the ones below.
    make = multiprocessing.get_context("spawn").Process(target=make_release, args=(model, release))
    make.start()
    make.join()
    total = size(release)
    grok = [sys.executable, "-m", "grok", "import", "xai", str(release), str(imported)]
    grok += ["--config", str(config), "--dtype", dtype]
    turns = []
    kinds = [
        (f"{what}, {state}", command, made, state == "warm")
        for state in ("cold", "warm")
        for what, command, made in (
            ("cp", ["cp", "-r", str(release), str(copy)], copy),
            ("import", grok, imported),
        )
    ]
    for what, command, made, warm in kinds * rounds:
        cache(release, warm)
        turns.append(run(what, command))
        shutil.rmtree(made)
    written = turns[-1].written
    cache(release, False)
    turns.append(run("import, killed", grok, (imported, written // 2)))
    there = size(imported)
    turns.append(run("import, resumed", grok))
    stored = OrbaxSource(imported)
    for spec in stored.tensors.values():
        for layer, part in layer_pieces(spec):
            if piece_checksum(stored, spec, part) != stored.checksums[spec.name, layer]:
                raise SystemExit(f"{spec.name} of layer {layer} is not what was imported")
    redone = turns[-1].written + there - written
    return {
        "layers": layers,
        "dtype": dtype,
        "release_bytes": total,
        "bytes_there_when_killed": there,
        "bytes_redone": redone,
        "turns": [dataclasses.asdict(turn) for turn in turns],
        # Rates, by bytes of the release.
        "of_cp_cold": best(turns, "cp, cold") / best(turns, "import, cold"),
        "of_cp_warm": best(turns, "cp, warm") / best(turns, "import, warm"),
    }


def best(turns: list[Turn], what: str) -> float:
    """Seconds of the fastest turn of a kind, without the start of Python."""
    return min(turn.inner for turn in turns if turn.what == what)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=1, help="of the release that is made")
    parser.add_argument("--dtype", default="int8", choices=["int8", "bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=2, help="how often each kind has its turn")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="grok-import-", dir=options.folder) as folder:
        figures = measure(Path(folder), options.layers, options.dtype, options.rounds)
    total = figures["release_bytes"]
    print(f"{total:,} bytes of {options.layers} layers of full width, to {options.dtype}\n")
    print(f"{'':16}  seconds  without start    GB/s  CPU s  peak MB  GB from disk")
    for turn in figures["turns"]:
        rate = (
            "" if turn["what"] in ("import, killed", "import, resumed") else total / turn["inner"]
        )
        print(
            f"{turn['what']:16}  {turn['seconds']:7.1f}  {turn['inner']:13.1f}  "
            f"{rate and f'{rate / 1e9:6.2f}':>6}  {turn['peak'] / 1e6:7,.0f}  "
            f"{turn['from_disk'] / 1e9:12.2f}"
        )
    print(f"\nrate of cp: {figures['of_cp_cold']:.2f} cold, {figures['of_cp_warm']:.2f} warm")
    print(
        f"killed with {figures['bytes_there_when_killed']:,} bytes there, of which "
        f"{figures['bytes_redone']:,} were done again; all checksums are right in the end"
    )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
