"""Trains the same small model with products in its own type, int8 and float8, with several seeds.

    python benchmarks/matmul_dtypes.py TEXT FOLDER
    python benchmarks/matmul_dtypes.py TEXT FOLDER --config grok-10m train.steps=2000

TEXT is a folder with train.txt, heldout.txt and tokenizer.model, like that of a finished `grok
quickstart`. A new folder gets the source of Python's standard library, 12 MB, each twentieth file
held out. The runs are in FOLDER/DTYPE-SEED; the same command resumes them, and `--only DTYPE-SEED`
trains one, so that several can run side by side. Prints for each type the bits per byte of held-out
text, mean and range over the seeds, the difference from the same seed without 8 bits, and how many
steps have a loss more than a tenth above the median of the ten before. On a CPU values in 8 bits
are multiplied as floats: this measures quality, not speed.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import sysconfig
from pathlib import Path

from grok.config.load import load_config
from grok.train.telemetry.metrics_file import read_metrics

GROK = (sys.executable, "-m", "grok")
DTYPES = ("compute", "int8", "float8")
SPIKE, WINDOW = 1.1, 10  # times the median of so many losses
NOT_TEXT = {"test", "tests", "idle_test", "site-packages", "pydoc_data"}  # tests and tables
HELD_OUT = 20  # one file of so many


def main() -> None:
    """Trains what is missing and prints the table, then a line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for all runs")
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", metavar="DTYPE-SEED", help="train this one and print its results")
    options = parser.parse_intermixed_args()
    runs = [f"{dtype}-{seed}" for seed in range(options.seeds) for dtype in DTYPES]
    if options.only and options.only not in runs:
        parser.error(f"--only {options.only} is no run; the runs are {', '.join(runs)}")
    if not options.text.exists():
        write_text(options.text, load_config(options.config).model.vocab_size)
    if options.only:
        dtype, _, seed = options.only.partition("-")
        print(json.dumps(train(options, dtype, int(seed))))
        return
    results: dict[str, list[dict]] = {dtype: [] for dtype in DTYPES}
    for seed in range(options.seeds):
        for dtype in DTYPES:
            results[dtype].append(train(options, dtype, seed))
            print_table(results)
    print(json.dumps(results))


def write_text(folder: Path, vocab_size: int) -> None:
    """The standard library's source files, each once, in the order of their hashes, and a tokenizer
    of the part to train on."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = (path for path in root.rglob("*.py") if not NOT_TEXT & set(path.parts))
    files = {hashlib.sha256(data).hexdigest(): data for data in map(Path.read_bytes, sorted(paths))}
    texts = [files[key].decode(errors="replace") for key in sorted(files)]
    unfinished = folder.with_name(folder.name + ".unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    train_text = unfinished / "train.txt"
    train_text.write_text("\n".join(t for i, t in enumerate(texts) if i % HELD_OUT))
    (unfinished / "heldout.txt").write_text("\n".join(texts[::HELD_OUT]))
    size = ["--out", str(unfinished / "tokenizer.model"), "--vocab-size", str(vocab_size)]
    subprocess.run([*GROK, "data", "tokenizer", str(train_text), *size], check=True)
    unfinished.rename(folder)


def train(options: argparse.Namespace, dtype: str, seed: int) -> dict:
    """Results of one run."""
    folder, text = options.folder.absolute() / f"{dtype}-{seed}", options.text.absolute()
    keys = {
        "folder": folder,
        "data.train": f"[{text / 'train.txt'}]",
        "data.validation": f"[{text / 'heldout.txt'}]",
        "data.tokenizer": text / "tokenizer.model",
        "data.seed": seed,
        "train.seed": seed,
        "train.log_every": 1,
        "mesh": "{data: 1, expert: 1, tensor: 1, simulated_devices: 0}",
        "model.matmul_dtype": dtype,
    }
    changes = [f"{key}={value}" for key, value in keys.items()]
    subprocess.run([*GROK, "train", options.config, *changes, *options.overrides], check=True)
    lines = read_metrics(folder / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    medians = [statistics.median(losses[i : i + WINDOW]) for i in range(len(losses) - WINDOW)]
    pairs = zip(losses[WINDOW:], medians, strict=True)
    held_out = [line for line in lines if "validation_bits_per_byte" in line][-1]
    return {
        "steps": len(losses),
        "bits_per_byte": held_out["validation_bits_per_byte"],
        "spikes": sum(loss > SPIKE * median for loss, median in pairs),
        "skipped": sum(int(line.get("skipped", 0)) for line in lines),
    }


def print_table(results: dict[str, list[dict]]) -> None:
    """A row for each type."""
    base = [run["bits_per_byte"] for run in results["compute"]]
    for dtype, runs in results.items():
        if not runs:
            continue
        bits = [run["bits_per_byte"] for run in runs]
        change = statistics.mean(b / right - 1 for b, right in zip(bits, base, strict=False))
        spikes = sum(run["spikes"] for run in runs)
        print(
            f"{dtype:8} {statistics.mean(bits):.4f} ({min(bits):.4f} to {max(bits):.4f}) "
            f"{change:+.2%}, {spikes} spikes in {sum(run['steps'] for run in runs)} steps"
        )


if __name__ == "__main__":
    main()
