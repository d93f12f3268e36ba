"""Trains a small model that is ready to publish, from text that comes with Python, in one command.

    python -m benchmarks.small_model runs/small-model
    python -m benchmarks.small_model runs/small-model --steps 200

The text is Python's standard library without its tests, and the language reference of `help()`,
both under the licence PSF-2.0; one file in fifty is held out. In FOLDER are then the text, the
tokenizer, the datasets with their manifests, the run with its logs and its report, and `model`, a
Hugging Face folder with a card that says all of it. The last steps are replayed and must be equal
bit for bit, and what was exported must be what was trained. Every command is printed first, and the
same one goes on after an interruption. The preset is grok-10m as it is, 7,400 steps: hours on a
laptop. Ends with a line of JSON.
"""

import argparse
import hashlib
import json
import pydoc_data.topics
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from grok.train.telemetry.metrics_file import read_metrics

PRESET, LICENCE = "grok-10m", "PSF-2.0"
EVERY = 10  # steps between checkpoints, and at most so many are replayed
HELD_OUT = 50  # one document of so many
MAX_FILE_BYTES = 200_000  # longer files are tables
SKIPPED = {"test", "tests", "idlelib", "site-packages", "pydoc_data"}
PROMPT = "def read_lines(path):\n"


def main() -> None:
    """Runs the commands, and prints what came of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, help="instead of the preset's")
    options = parser.parse_args()
    folder = options.folder.absolute()
    text, data, run, model = (folder / name for name in ("text", "data", "run", "model"))
    tokenizer = folder / "tokenizer.model"
    if not text.exists():
        write_text(text)
    if not tokenizer.exists():
        grok("data", "tokenizer", text / "train.txt", "--out", tokenizer, "--vocab-size", 4096)
    for name in ("train", "held-out"):
        words = ["--tokenizer", tokenizer, "--id-field", "id", "--licence", LICENCE]
        grok("data", "prepare", text / f"{name}.jsonl", "--out", data / name, *words)
    steps = []
    if options.steps:
        warmup = max(1, options.steps // 20)
        steps = [f"train.steps={options.steps}", f"optimizer.warmup_steps={warmup}"]
    grok(
        *("train", PRESET, f"folder={run}", f"data.datasets=[{{path: {data / 'train'}}}]"),
        *(f"data.validation_dataset={data / 'held-out'}", f"data.tokenizer={tokenizer}"),
        *("train.eval_every=500", "mesh.data=1", f"checkpoint.every={EVERY}"),
        *steps,
    )
    grok("report", run)
    grok("replay", run, "--from", (last_step(run) - 1) // EVERY * EVERY)
    origin = f"none: trained from scratch, by `python -m benchmarks.small_model` ({PRESET})"
    manifest = ["--data-manifest", data / "train" / "manifest.json", "--licence", "psf-2.0"]
    grok("export", "hf", run, model, "--dtype", "float32", "--base-weights", origin, *manifest)
    grok("verify", run, model)
    grok("sample", run, "--prompt", PROMPT, "--max-tokens", 64, "--temperature", 0.7)
    print(json.dumps(figures(run)))


def grok(*words: object) -> None:
    """Prints a command of grok and runs it; ends with its code where it fails."""
    command = ["grok", *map(str, words)]
    print(f"\n$ {shlex.join(command)}", flush=True)
    if code := subprocess.run([sys.executable, "-m", *command], check=False).returncode:
        sys.exit(code)


def write_text(folder: Path) -> None:
    """Documents as JSON lines, those to train on and those held out, and a text of the former for
    the tokenizer. Files alike are there once."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    root, documents = Path(sysconfig.get_paths()["stdlib"]), dict(pydoc_data.topics.topics)
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not SKIPPED & set(relative.parts) and path.stat().st_size <= MAX_FILE_BYTES:
            documents[str(relative)] = path.read_text(encoding="utf-8", errors="replace")
    unique = {hashlib.sha256(text.encode()).hexdigest(): name for name, text in documents.items()}
    files: dict[str, list[str]] = {"train": [], "held-out": []}
    for key, name in sorted(unique.items()):
        if documents[name].strip():
            files["held-out" if int(key, 16) % HELD_OUT == 0 else "train"].append(name)
    for kind, names in files.items():
        lines = (json.dumps({"id": name, "text": documents[name]}) + "\n" for name in names)
        (unfinished / f"{kind}.jsonl").write_text("".join(lines))
    text = "\n\n".join(documents[name] for name in files["train"])
    (unfinished / "train.txt").write_text(text)
    unfinished.rename(folder)


def last_step(run: Path) -> int:
    """The last step of the run."""
    return max(line["step"] for line in read_metrics(run / "metrics.jsonl"))


def figures(run: Path) -> dict:
    """Steps, tokens, and the last bits per byte of the held-out text."""
    lines = read_metrics(run / "metrics.jsonl")
    held_out = [line for line in lines if "validation_bits_per_byte" in line][-1]
    seen = [line for line in lines if "tokens_seen" in line][-1]
    return {
        "steps": held_out["step"],
        "tokens": sum(seen["tokens_seen"].values()),
        "bits_per_byte": held_out["validation_bits_per_byte"],
    }


if __name__ == "__main__":
    main()
