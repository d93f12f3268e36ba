"""`grok quickstart`, as a story: text, tokenizer, training, a restart, results, samples.

Training and sampling run in processes of their own through the same commands that a user types;
this process never imports JAX.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from grok.config import RunConfig
from grok.config.load import load_config
from grok.data.text_stream import read_stream
from grok.data.tokenizers import load_tokenizer
from grok.data.tokenizers.sentencepiece import train_tokenizer
from grok.errors import DONE, SAVED, GrokError
from grok.quickstart.baselines import (
    bigram_bits_per_byte,
    gzip_bits_per_byte,
    unigram_bits_per_byte,
)
from grok.quickstart.corpus import write_corpus
from grok.quickstart.plot import plot_run
from grok.train.telemetry.metrics_file import read_metrics

GROK = (sys.executable, "-m", "grok")
PROMPTS = ("The for statement is used to", "If the object is not callable,")


def run(folder: Path) -> int:
    """The whole quickstart in `folder`; returns the exit code of the process."""
    console = Console(highlight=False)
    started = time.monotonic()
    metrics_path = folder / "metrics.jsonl"

    # ---- text and tokenizer
    config_path = prepare(folder, console)
    config = load_config(config_path)

    # ---- train to the middle, stop the process, let a new one finish
    try:
        half = config.train.steps // 2
        if last_step(metrics_path) < half:
            console.rule("training, first process")
            code = train(config_path, stop_at=half)
            if code not in (DONE, SAVED):
                return code
        console.rule("the first process has ended; a new one resumes from its checkpoint")
        if code := train(config_path, stop_at=None):
            return code
    except KeyboardInterrupt:
        console.print("stopped; `grok quickstart` goes on from here")
        return SAVED

    # ---- what came of it
    console.rule("results")
    metrics = read_metrics(metrics_path)
    bits = compare(config, metrics)
    console.print(results_table(bits))
    plot_path = folder / "quickstart.png"
    baselines = {name: value for name, value in bits.items() if name != "this model"}
    plot_run(metrics, plot_path, baselines)
    console.print(f"Loss and expert load over time: {plot_path}")
    for prompt in PROMPTS:
        console.rule("a continuation")
        if code := sample(folder, prompt):
            return code
    console.rule("next")
    console.print(next_steps(folder, config_path), soft_wrap=True)
    console.print(f"Took {time.monotonic() - started:.0f} s.")
    return DONE


def prepare(folder: Path, console: Console) -> Path:
    """Text, tokenizer and config in `folder`; the config's path.

    A run that was interrupted is kept, to go on; what a finished one left is made anew.
    """
    config_path = folder / "quickstart.yaml"
    if config_path.exists():
        steps = load_config(config_path).train.steps
        if last_step(folder / "metrics.jsonl") < steps:
            return config_path
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        for name in ("metrics.jsonl", "events.jsonl", "run.json"):
            (folder / name).unlink(missing_ok=True)
    elif folder.is_dir() and any(folder.iterdir()):
        raise GrokError(
            f"{folder} holds other files; --folder with a new name would keep them safe."
        )
    train_path, heldout_path = write_corpus(folder)
    tokenizer_path = folder / "quickstart.model"
    vocab_size = load_config("quickstart").model.vocab_size
    tokenizer = train_tokenizer([train_path], tokenizer_path, vocab_size)
    config_path.write_text(
        "# Written by `grok quickstart`.\n"
        "extends: quickstart\n"
        f"folder: {folder.absolute()}\n"
        "data:\n"
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


def train(config_path: Path, stop_at: int | None) -> int:
    """Runs `grok train` to its end, or asks it to stop once it has logged step `stop_at`.

    Returns the command's exit code.
    """
    with subprocess.Popen([*GROK, "train", str(config_path)]) as process:
        try:
            metrics_path = config_path.parent / "metrics.jsonl"
            while stop_at is not None and process.poll() is None:
                if last_step(metrics_path) >= stop_at:
                    process.send_signal(signal.SIGTERM)
                    break
                time.sleep(0.1)
            process.wait()
        except KeyboardInterrupt:
            # The terminal sent it to the training process too, which saves before it leaves.
            with contextlib.suppress(KeyboardInterrupt):
                process.wait()
            raise
    return process.returncode


def last_step(metrics_path: Path) -> int:
    """The newest step in a metrics file; 0 where there is none yet."""
    if not metrics_path.exists():
        return 0
    return max((line["step"] for line in read_metrics(metrics_path)), default=0)


def compare(config: RunConfig, metrics: list[dict]) -> dict[str, float]:
    """Bits per byte of the held-out text under the trained model and under simple ones."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    vocab_size = config.model.vocab_size
    train_stream = read_stream(config.data.train, tokenizer, vocab_size)
    heldout = read_stream(config.data.validation, tokenizer, vocab_size)
    text = b"".join(Path(path).read_bytes() for path in config.data.validation)
    trained = [line["validation_bits_per_byte"] for line in metrics if "validation_loss" in line]
    return {
        "unigram": unigram_bits_per_byte(train_stream, heldout, vocab_size),
        "gzip -9": gzip_bits_per_byte(text),
        "bigram": bigram_bits_per_byte(train_stream, heldout, vocab_size),
        "this model": trained[-1],
    }


def results_table(bits: dict[str, float]) -> Table:
    """The comparison as a table, worst first."""
    table = Table("held-out text under", "bits per byte", title="Lower is better")
    for name, value in sorted(bits.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{value:.3f}", style="bold" if name == "this model" else "")
    return table


def sample(folder: Path, prompt: str) -> int:
    """Runs `grok sample`, which prints a continuation of `prompt`; its exit code."""
    options = ["--prompt", prompt, "--max-tokens", "60"]
    return subprocess.run([*GROK, "sample", str(folder), *options], check=False).returncode


def next_steps(folder: Path, config_path: Path) -> str:
    """Four commands to try, as they work in the shell that this was started from."""
    grok = "grok" if shutil.which("grok") else os.path.relpath(Path(sys.executable).parent / "grok")
    return (
        f'{grok} sample {folder} --prompt "Python is" --temperature 1\n'
        f"{grok} report {folder}\n"
        f"{grok} train {config_path} train.steps=1200 folder={folder}-longer\n"
        f"{grok} config grok-1"
    )
