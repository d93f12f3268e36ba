"""`grok quickstart`, in order: text, tokenizer, training, a restart, results, samples. Training and
sampling run in processes of their own, by a user's commands; this process never imports JAX."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from grok.config import RunConfig
from grok.config.load import load_config
from grok.data.stream_batches import read_stream
from grok.data.tokenizers import load_tokenizer
from grok.data.tokenizers.sentencepiece import train_tokenizer
from grok.errors import DONE, SAVED, GrokError
from grok.quickstart import baselines
from grok.quickstart.corpus import write_corpus
from grok.quickstart.plot import plot_run
from grok.train.telemetry.metrics_file import read_metrics

GROK = (sys.executable, "-m", "grok")
PROMPTS = ("The for statement is used to", "If the object is not callable,")


def run(folder: Path) -> int:
    """The whole quickstart in `folder`; returns the exit code of the process."""
    console = Console(highlight=False)
    started = time.monotonic()
    config_path = prepare_folder(folder, console)
    if code := train_with_a_restart(config_path, console):
        return code
    show_results(config_path, console)
    for prompt in PROMPTS:
        console.rule("a continuation")
        options = ["--prompt", prompt, "--max-tokens", "60"]
        if code := subprocess.run([*GROK, "sample", str(folder), *options], check=False).returncode:
            return code
    console.rule("next")
    console.print(next_steps(folder), soft_wrap=True)
    console.print(f"Took {time.monotonic() - started:.0f} s.")
    return DONE


def prepare_folder(folder: Path, console: Console) -> Path:
    """Writes text, tokenizer and config unless a run was interrupted; returns the config's path."""
    config_path = folder / "quickstart.yaml"
    if config_path.exists():
        if last_step(folder / "metrics.jsonl") < load_config(config_path).train.steps:
            return config_path
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        for name in ("metrics.jsonl", "events.jsonl", "run.json"):
            (folder / name).unlink(missing_ok=True)
    elif folder.is_dir() and any(folder.iterdir()):
        raise GrokError(f"{folder} holds other files; --folder with a new name keeps them safe.")
    train_path, heldout_path = write_corpus(folder)
    tokenizer_path = folder / "quickstart.model"
    vocab_size = load_config("quickstart").model.vocab_size
    tokenizer = train_tokenizer([train_path], tokenizer_path, vocab_size)
    config_path.write_text(
        "# Written by `grok quickstart`.\n"
        f"extends: quickstart\nfolder: {folder.absolute()}\ndata:\n"
        f"  train: [{train_path.absolute()}]\n"
        f"  validation: [{heldout_path.absolute()}]\n"
        f"  tokenizer: {tokenizer_path.absolute()}\n"
    )
    console.print(
        f"Text: Python's own language reference, {train_path.stat().st_size:,} bytes to train on "
        f"and {heldout_path.stat().st_size:,} held out; tokenizer of {tokenizer.vocab_size:,} "
        f"pieces trained on the first."
    )
    return config_path


def train_with_a_restart(config_path: Path, console: Console) -> int:
    """Trains to the end, with one restart in the middle; returns the exit code."""
    half = load_config(config_path).train.steps // 2
    try:
        if last_step(config_path.parent / "metrics.jsonl") < half:
            console.rule("training, first process")
            code = train(config_path, stop_at=half)
            if code not in (DONE, SAVED):
                return code
        console.rule("the first process has ended; a new one resumes from its checkpoint")
        return train(config_path, stop_at=None)
    except KeyboardInterrupt:
        console.print("stopped; `grok quickstart` continues from here")
        return SAVED


def train(config_path: Path, stop_at: int | None) -> int:
    """Runs `grok train`, asked to stop once it has logged step `stop_at`; returns its exit code."""
    metrics_path = config_path.parent / "metrics.jsonl"
    with subprocess.Popen([*GROK, "train", str(config_path)]) as process:
        try:
            while stop_at is not None and process.poll() is None:
                if last_step(metrics_path) >= stop_at:
                    process.send_signal(signal.SIGTERM)
                    break
                time.sleep(0.1)
            process.wait()
        except KeyboardInterrupt:
            # The terminal sent it to the training process too, which saves before it exits.
            with contextlib.suppress(KeyboardInterrupt):
                process.wait()
            raise
    return process.returncode


def last_step(metrics_path: Path) -> int:
    """The newest step in a metrics file; 0 where there is none yet."""
    if not metrics_path.exists():
        return 0
    return max((line["step"] for line in read_metrics(metrics_path)), default=0)


def show_results(config_path: Path, console: Console) -> None:
    """Prints a table of the model beside simple ones, and draws the run."""
    console.rule("results")
    folder = config_path.parent
    metrics = read_metrics(folder / "metrics.jsonl")
    bits = compare(load_config(config_path), metrics)
    table = Table("held-out text under", "bits per byte", title="Lower is better")
    for name, value in sorted(bits.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{value:.3f}", style="bold" if name == "this model" else "")
    console.print(table)
    plot_path = folder / "quickstart.png"
    del bits["this model"]
    plot_run(metrics, plot_path, bits)
    console.print(f"Loss and expert load over time: {plot_path}")


def compare(config: RunConfig, metrics: Sequence[Mapping]) -> dict[str, float]:
    """Bits per byte of the held-out text under the trained model and under simple ones."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    vocab_size = config.model.vocab_size
    train_stream = read_stream(config.data.train, tokenizer, vocab_size)
    heldout = read_stream(config.data.validation, tokenizer, vocab_size)
    text = b"".join(Path(path).read_bytes() for path in config.data.validation)
    trained = [line["validation_bits_per_byte"] for line in metrics if "validation_loss" in line]
    return {
        "unigram": baselines.unigram_bits_per_byte(train_stream, heldout, vocab_size),
        "gzip -9": baselines.gzip_bits_per_byte(text),
        "bigram": baselines.bigram_bits_per_byte(train_stream, heldout, vocab_size),
        "this model": trained[-1],
    }


def next_steps(folder: Path) -> str:
    """Commands to try, as they work in the user's shell, each below its sentence."""
    grok = "grok" if shutil.which("grok") else os.path.relpath(Path(sys.executable).parent / "grok")
    steps = {
        "Continue a text of your own:": [f'sample {folder} --prompt "Python is" --temperature 1'],
        "Serve the model; http://localhost:8000 is a page to try it:": [
            f"serve {folder} port=8000"
        ],
        "Write a page about the run, with curves and the load of each expert:": [
            f"report {folder}"
        ],
        "Train a longer run, and compare the two:": [
            f"train {folder} train.steps=1200 folder={folder}-longer",
            f"report {folder} {folder}-longer",
        ],
        "See every setting of the released model; docs/own-text.md trains on your text:": [
            "config grok-1"
        ],
    }
    lines = []
    for sentence, commands in steps.items():
        lines.append(sentence)
        lines += [f"  {grok} {command}" for command in commands]
    return "\n".join(lines)
