"""Trains a mixture of experts from scratch beside a dense model of equal FLOPs per token, on a CPU.

    python benchmarks/moe_against_dense.py FOLDER
    python benchmarks/moe_against_dense.py FOLDER train.steps=3000 optimizer.peak_lr=1e-3

Takes the .py, .md and .rst files of site-packages and Python's own language reference, holds out
some documents, prepares the rest with `grok data`, and trains from-scratch and from-scratch-dense
with `grok train`: the same batches in the same order, the same optimizer. The runs are in
FOLDER/moe and FOLDER/dense; the same command resumes them. Prints a table, then a line of JSON. On
a machine whose cores are busy with other work, XLA_FLAGS=--xla_cpu_multi_thread_eigen=false wastes
fewer of them.
"""

import argparse
import hashlib
import json
import pydoc_data.topics
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np

from grok.config.load import load_config
from grok.model.flops import flops_per_token
from grok.model.params import num_active_parameters, num_parameters
from grok.quickstart.corpus import heldout_topics
from grok.train.telemetry.metrics_file import read_metrics

GROK = (sys.executable, "-m", "grok")
MIXTURE_WEIGHTS = {"python": 0.86, "reference": 0.11, "docs": 0.03}
PYTHON_BYTES = 24_000_000
MAX_FILE_BYTES = 200_000  # longer files are tables and generated code
HELDOUT_SHARE = {"python": 0.005, "docs": 0.1}  # of the text; the reference is split by topic
PRESETS = {"moe": "from-scratch", "dense": "from-scratch-dense"}


def main() -> None:
    """Prepares the data, trains both models and prints their results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for both configs")
    parser.add_argument("--only", choices=PRESETS, help="train this one alone")
    options = parser.parse_args()
    folder = options.folder.absolute()
    prepare(folder)
    results = {}
    for name in [options.only] if options.only else PRESETS:
        config = write_config(folder, name)
        subprocess.run([*GROK, "train", config, *options.overrides], check=True)
        results[name] = figures(folder, name)
        print_table(results)
    print(json.dumps(results))


def prepare(folder: Path) -> None:
    """Text of three sources, a tokenizer, a dataset of each, and one of all held-out documents."""
    text, tokenizer = folder / "text", folder / "tokenizer.model"
    if not text.exists():
        unfinished = folder / "text.unfinished"
        unfinished.mkdir(parents=True, exist_ok=True)
        write_sources(unfinished)
        unfinished.rename(text)
    if not tokenizer.exists():
        vocab_size = str(load_config(PRESETS["moe"]).model.vocab_size)
        sample = [str(path) for path in sorted(text.glob("*.sample.txt"))]
        options = ["--out", str(tokenizer), "--vocab-size", vocab_size]
        subprocess.run([*GROK, "data", "tokenizer", *sample, *options], check=True)
    held_out = [str(text / f"{name}.heldout.jsonl") for name in MIXTURE_WEIGHTS]
    for name, sources in {name: [str(text / f"{name}.jsonl")] for name in MIXTURE_WEIGHTS}.items():
        prepare_dataset(folder / "data" / name, sources, tokenizer)
    prepare_dataset(folder / "data" / "heldout", held_out, tokenizer)


def prepare_dataset(out: Path, sources: list[str], tokenizer: Path) -> None:
    """Runs `grok data prepare`, which returns at once if the dataset is complete."""
    options = ["--out", str(out), "--tokenizer", str(tokenizer), "--id-field", "id"]
    subprocess.run([*GROK, "data", "prepare", *sources, *options], check=True)


def write_sources(folder: Path) -> None:
    """Documents of each source as JSON lines, each once, in the order of their hashes: those held
    out, those to train on, and a text of some of the latter for the tokenizer."""
    topics = pydoc_data.topics.topics
    is_heldout = heldout_topics(topics)
    write_source(
        folder,
        "reference",
        [(name, text) for name, text in topics.items() if name in is_heldout],
        [(name, text) for name, text in topics.items() if name not in is_heldout],
    )
    for name, patterns in {"python": ("*.py",), "docs": ("*.md", "*.rst")}.items():
        documents = find_documents(patterns)
        size = sum(len(text) for _, text in documents)
        heldout = [d for d, before in with_sums(documents) if before < HELDOUT_SHARE[name] * size]
        write_source(folder, name, heldout, documents[len(heldout) :])


def find_documents(patterns: tuple[str, ...]) -> list[tuple[str, str]]:
    """Name and text of the files of site-packages that match, at most PYTHON_BYTES."""
    root = Path(sysconfig.get_paths()["purelib"])
    documents = {}
    for path in sorted(path for pattern in patterns for path in root.rglob(pattern)):
        data = path.read_bytes()
        if len(data) <= MAX_FILE_BYTES and data.strip():
            # Copies of a file count once, under the first of their names.
            document = str(path.relative_to(root)), data.decode(errors="replace")
            documents.setdefault(hashlib.sha256(data).hexdigest(), document)
    in_order = [documents[key] for key in sorted(documents)]
    return [document for document, before in with_sums(in_order) if before < PYTHON_BYTES]


def with_sums(documents: list[tuple[str, str]]) -> list[tuple[tuple[str, str], int]]:
    """Each document beside the length of those before it."""
    sizes = np.cumsum([0, *(len(text) for _, text in documents)])
    return list(zip(documents, sizes.tolist(), strict=False))


def write_source(folder: Path, name: str, heldout: list, train: list) -> None:
    """The three files of a source."""
    for path, documents in {f"{name}.heldout.jsonl": heldout, f"{name}.jsonl": train}.items():
        lines = (json.dumps({"id": key, "text": text}) + "\n" for key, text in documents)
        (folder / path).write_text("".join(lines))
    # A sixth of the source, so that none drowns the others.
    sample = "\n\n".join(text for _, text in train[::6])
    (folder / f"{name}.sample.txt").write_text(sample)


def write_config(folder: Path, name: str) -> str:
    """Writes the config of a run, its preset and its data, and returns the path."""
    data = folder / "data"
    datasets = [
        f"{{path: {data / source}, weight: {weight}}}" for source, weight in MIXTURE_WEIGHTS.items()
    ]
    path = folder / f"{name}.yaml"
    path.write_text(
        f"extends: {PRESETS[name]}\n"
        f"folder: {folder / name}\n"
        "data:\n"
        f"  datasets: [{', '.join(datasets)}]\n"
        f"  validation_dataset: {data / 'heldout'}\n"
        f"  tokenizer: {folder / 'tokenizer.model'}\n"
    )
    return str(path)


def figures(folder: Path, name: str) -> dict:
    """Results of a run. Expert load: the busiest expert's over the mean, mean over the layers and
    the logged steps after warm-up."""
    config = load_config(folder / name / "config.yaml")
    lines = read_metrics(folder / name / "metrics.jsonl")
    validation = [line for line in lines if "validation_loss" in line][-1]
    loads = [
        np.array(line["expert_load_layers"])
        for line in lines
        if "expert_load_layers" in line and line["step"] > config.optimizer.warmup_steps
    ]
    losses = [line["loss"] for line in lines if "loss" in line]
    return {
        "parameters": num_parameters(config.model),
        "active": num_active_parameters(config.model),
        "MFLOPs a token": flops_per_token(config.model, config.data.sequence_length) / 1e6,
        "steps": lines[-1]["step"],
        "tokens": sum([line["tokens_seen"] for line in lines if "loss" in line][-1].values()),
        "training loss, last 10 lines": float(np.mean(losses[-10:])),
        "validation loss": validation["validation_loss"],
        "validation bits per byte": validation["validation_bits_per_byte"],
        "expert load, max / mean": float(np.mean([load.max(1) / load.mean(1) for load in loads])),
    }


def print_table(results: dict[str, dict]) -> None:
    """A row for each figure, a column for each run."""
    print(f"{'':30}" + "".join(f"{name:>14}" for name in results))
    for key in next(iter(results.values())):
        cells = (figures[key] for figures in results.values())
        said = (f"{cell:,}" if isinstance(cell, int) else f"{cell:.3f}" for cell in cells)
        print(f"{key:30}" + "".join(f"{cell:>14}" for cell in said))


if __name__ == "__main__":
    main()
