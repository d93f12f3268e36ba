"""A training step on this CPU, grok's and PyTorch's, in one run.

    python -m benchmarks.against_torch
    python -m benchmarks.against_torch --torch ENV/bin/python --turns 3

A mixture of experts in Mixtral's form: embed dim 512, 4 layers, 8 experts of which each token
selects two, vocabulary 8192, 8 rows of 256 tokens, float32, AdamW. PyTorch runs the Mixtral of the
package transformers in three forms: expert by expert, grouped_mm, and that by torch.compile. Both
packages are installed from the package index into an environment of their own (some 1 GB; torch
from an index of CPU builds if `--index` names one), or found in the one whose Python is `--torch`.
All get the same number of threads, are in memory together, and take turns, so that other work on
the machine slows all of them. Printed are medians of the steps of all turns by the wall clock.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax

from benchmarks.memory import peak_bytes
from benchmarks.train_against_maxtext import LENGTH, ROWS, prepared_step
from benchmarks.worker import Worker, make_environment
from grok.hardware import configure_devices

PACKAGES = ("torch", "transformers")
WORKER = Path(__file__).with_name("torch_worker.py")
FORMS = ("eager", "grouped_mm", "compiled")
MIXTRAL = (
    "model.tie_embeddings=false",
    "model.norm.sandwich=false",
    "model.attention.logit_softcap=null",
    "model.moe.activation=silu",
    "model.moe.normalize=true",
    "model.embedding_multiplier=1",
    "model.logit_multiplier=1",
)
DIFFERENCES = """What differs: here a step also checks every gradient for numbers that are not
finite, keeps the router's statistics and the norms that a run logs, and shuts out no token and
drops none, as PyTorch's forms do not either; theirs clips gradients by their norm and reads the
loss."""


class Ours:
    """Our step, and its state."""

    def __init__(self) -> None:
        self._step, self._state, self._batch, self._mesh = prepared_step("none", MIXTRAL)
        self.run(2)

    def run(self, steps: int) -> list[float]:
        """Seconds of each step."""
        times = []
        with jax.set_mesh(self._mesh):
            for _ in range(steps):
                began = time.perf_counter()
                self._state, metrics = self._step(self._state, self._batch)
                jax.block_until_ready((self._state, metrics))
                times.append(time.perf_counter() - began)
        return times


def main() -> None:
    """Takes the turns and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch", help="Python of an environment that has torch and transformers")
    parser.add_argument("--index", help="package index of torch's CPU builds")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="of each in a turn")
    parser.add_argument("--forms", default=",".join(FORMS), help="of PyTorch, with commas")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    configure_devices(0)
    with contextlib.ExitStack() as stack:
        python = options.torch
        if python is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            extra = ["--extra-index-url", options.index] if options.index else []
            python = make_environment(folder / "torch", *extra, *PACKAGES)
        shape = options.threads, ROWS, LENGTH
        theirs = {
            form: stack.enter_context(Worker(python, WORKER, form, *shape))
            for form in options.forms.split(",")
        }
        ours, times = Ours(), dict[str, list[float]]()
        for _ in range(options.turns):
            times.setdefault("grok", []).extend(ours.run(options.steps))
            for form, worker in theirs.items():
                times.setdefault(f"PyTorch, {form}", []).extend(worker.ask(options.steps))
        memory = [peak_bytes(), *(worker.ask("memory")[0] for worker in theirs.values())]
    first = statistics.median(times["grok"])
    for (name, seconds), peak in zip(times.items(), memory, strict=True):
        median = statistics.median(seconds)
        rate = ROWS * LENGTH / median
        text = f"{median:6.2f} s  {rate:6.0f} tokens/s  {median / first:5.2f} x grok's time"
        print(f"{name:22} {text}  {peak / 1e9:.2f} GB at most")
    print(DIFFERENCES)


if __name__ == "__main__":
    main()
