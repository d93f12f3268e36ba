"""Decoding and prefill on this CPU, grok's and llama.cpp's, in one run.

    python -m benchmarks.against_llama_cpp
    python -m benchmarks.against_llama_cpp --llama ENV/bin/python --turns 7
    taskset -c 0 python -m benchmarks.against_llama_cpp --threads 1 --types float32

A mixture of experts with random weights in Mixtral's form: embed dim 512, 4 layers, 8 experts of
which each token selects two, vocabulary 8192. llama.cpp reads the GGUF file that `grok export gguf`
writes of it; its library is that of the package xllamacpp, installed from the package index into an
environment of its own (some 100 MB), or found in the one whose Python is `--llama`. Both sides get
the same number of threads, take the likeliest token, and alternate, a turn of each at a time, so
that other work on the machine slows both. Printed are medians by the wall clock over all turns.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

import grok
from benchmarks.decode import one_prompt, read_bytes_per_second, read_parameters
from benchmarks.memory import resident_bytes
from benchmarks.worker import Worker, make_environment
from grok.config import AttentionConfig, EngineConfig, ModelConfig, MoEConfig
from grok.config.model import NormConfig
from grok.config.sampling import SamplingParams
from grok.hardware import configure_devices
from grok.infer.engine import Engine
from grok.infer.request import Request
from grok.ops.cpu import few_rows
from grok.weights.gguf.export import export_gguf
from grok.weights.huggingface.export import export_huggingface
from grok.weights.load import load
from tests.fixtures.random_weights import RandomSource

PACKAGES = ("numpy", "xllamacpp==2026.10.11549")  # a release whose layouts the worker knows
WORKER = Path(__file__).with_name("llama_cpp_worker.py")
CONFIG = ModelConfig(
    vocab_size=8192,
    num_layers=4,
    embed_dim=512,
    context_length=512,
    embedding_multiplier=1.0,
    logit_multiplier=1.0,
    tie_embeddings=False,
    norm=NormConfig(sandwich=False),
    attention=AttentionConfig(num_heads=8, num_kv_heads=2, head_dim=64, logit_softcap=None),
    moe=MoEConfig(dim=2048, activation="silu", normalize=True),
)
# Our type, that of token tables and of activations, theirs, and bytes of a weight here.
TYPES = (
    ("float32", "float", "float32", "float32", 4),
    ("int8", "int8", "float32", "q8_0", 1),
    ("int4", "int8", "float32", "q4_0", 0.5),
    ("bfloat16", "float", "bfloat16", "float16", 2),
)
DIFFERENCES = """What differs: llama.cpp keeps keys and values in float16 and chooses flash
attention itself, here they are in the type of activations; it multiplies q8_0 and q4_0 by
activations rounded to int8, here int8 and int4 are multiplied by float32; its q8_0 and q4_0 hold
all weights, here, beside experts in int4, attention and the token tables are in int8;
its steps end with logits and an argmax in NumPy, here with a sampler of all settings,
log-probabilities and the engine's own work, a step ahead of the host."""


class Ours:
    """Engines of one model, of as many slots as asked for."""

    def __init__(self, model: Any, mesh: Any):
        self._model, self._mesh, self._engines = model, mesh, dict[int, Engine]()

    def engine(self, slots: int) -> Engine:
        """The engine of so many slots."""
        if slots not in self._engines:
            options = EngineConfig(max_num_seqs=slots, page_size=32, prefill_chunk_size=256)
            self._engines[slots] = Engine(self._model, None, self._mesh, options)
        return self._engines[slots]

    def decode(self, slots: int, rows: int, steps: int) -> list[float]:
        """Seconds of each step of so many requests."""
        engine, params = self.engine(slots), SamplingParams(max_tokens=steps + 10, temperature=0)
        before = engine.stats.tokens_out
        for row in range(rows):
            engine.submit(Request(f"{row}", (5 + row,), params))
        while engine.stats.waiting or engine.stats.tokens_out - before < 4 * rows:
            engine.step()
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - began)
        while engine.unfinished:
            engine.step()
        return times


def main() -> None:
    """Takes the turns and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--llama", help="Python of an environment that has xllamacpp")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="of each in a turn")
    names = [types[0] for types in TYPES]
    parser.add_argument("--types", default=",".join(names), help="of ours, with commas")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    configure_devices(0)
    with tempfile.TemporaryDirectory() as folder:
        python = options.llama or make_environment(Path(folder, "llama"), *PACKAGES)
        print(few_rows.describe(), flush=True)
        speed = read_bytes_per_second()
        print(f"all cores read {speed / 1e9:.1f} GB/s; {options.threads} threads", flush=True)
        source = RandomSource(CONFIG, dtype="float32")
        export_huggingface(source, Path(folder, "model"), "float32", family="mixtral")
        for types in (types for types in TYPES if types[0] in options.types.split(",")):
            compare(Path(folder), python, *types, speed, options)
    print(DIFFERENCES)


def compare(
    folder: Path,
    python: str,
    dtype: str,
    table: Any,
    compute: Any,
    theirs: str,
    size: float,
    speed: float,
    options: argparse.Namespace,
) -> None:
    """Prints the rows of one type."""
    file = folder / f"{theirs}.gguf"
    export_gguf(RandomSource(CONFIG, dtype="float32"), file, theirs)
    types: Any = {"param_dtype": dtype, "embedding_dtype": table, "compute_dtype": compute}
    config = dataclasses.replace(CONFIG, **types)
    mesh = grok.make_mesh(devices=jax.devices()[:1])
    ours = Ours(load(folder / "model", config, mesh, dtype), mesh)
    with Worker(python, WORKER, file, options.threads) as llama:
        times: dict[str, tuple[list[float], list[float]]] = {}
        for turn in range(options.turns + 1):  # the first compiles
            for name, one, other in measurements(ours, llama, options.steps):
                pair = times.setdefault(name, ([], []))
                if turn:
                    pair[0].extend(one())
                    pair[1].extend(other())
                else:
                    one(), other()
        for name, (a, b) in times.items():
            here, there = (1e3 * statistics.median(x) for x in (a, b))
            print(f"{dtype} | {theirs} | {name} | {here:.2f} ms | {there:.2f} | {there / here:.2f}")
        for rows in (1, 8):
            floor = 1e3 * size * read_parameters(CONFIG, rows) / speed
            print(f"{dtype} | floor of {rows} rows, were all weights of it: {floor:.2f} ms")
        memory = resident_bytes() / 1e6, llama.ask("memory")[0] / 1e6
        print(f"{dtype} | memory: {memory[0]:.0f} MB, with JAX and all engines; {memory[1]:.0f} MB")
    sys.stdout.flush()


def measurements(ours: Ours, llama: Worker, steps: int) -> Iterator[tuple[str, Any, Any]]:
    """Names of measurements, and what makes one here and there."""
    for name, slots, rows in (
        ("decode, 1 row, 1 slot", 1, 1),
        ("decode, 1 row, 8 slots", 8, 1),
        ("decode, 8 rows", 8, 8),
    ):
        yield (
            name,
            lambda slots=slots, rows=rows: ours.decode(slots, rows, steps),
            lambda rows=rows: llama.ask("decode", rows, steps),
        )
    yield (
        "a prompt of 256",
        lambda: [one_prompt(ours.engine(1), 3)],
        lambda: llama.ask("prefill", 256, 3),
    )


if __name__ == "__main__":
    main()
