"""Kills a `grok batch` of two processes again and again, and compares its answers.

    python -m benchmarks.batch_kills --prompts 5000 --kills 10

From the root of the repository. A random tiny model answers prompts of many lengths and parameters,
some of them bad: once undisturbed in one process, and once in two, of which one or the other gets a
SIGKILL at a random moment and is started again. Prints how many requests are answered, how often
each, and whether the lines are the same; ends with a line of JSON.
"""

import argparse
import collections
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from grok.checkpoint.huggingface_export import export_huggingface
from grok.checkpoint.random_source import RandomSource
from grok.config import GrokConfig
from grok.data.tokenizer import train_tokenizer
from grok.train.hosts import VARIABLES

MODEL = GrokConfig(
    vocab_size=320,
    num_layers=1,
    embed_dim=32,
    mlp_dim=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    context_length=128,
    compute_dtype="float32",
)
CONFIG = """
weights: {folder}/weights
input: [{folder}/prompts.jsonl]
output: {folder}/answers
mesh: {{data: 1, simulated_devices: 1}}
engine: {{slots: 32}}
compute_dtype: float32
shard_size: 100
"""


def main() -> None:
    """Runs the job twice, undisturbed and killed, and compares."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, options.prompts, options.seed)
        began = time.monotonic()
        assert start(folder, "straight", 0, 1).wait() == 0
        seconds = time.monotonic() - began
        kills = disturbed(folder, options.kills, random.Random(options.seed), seconds)
        straight, broken = (read(folder / name) for name in ("straight", "broken"))
        times = collections.Counter(collections.Counter(line["index"] for line in broken).values())
        found = {
            "prompts": options.prompts,
            "kills": kills,
            "seconds_undisturbed": round(seconds, 1),
            "answered": sum("choices" in line for line in broken),
            "failed": sum("error" in line for line in broken),
            "times_each": dict(times),
            "equal": straight == broken and len(broken) == options.prompts,
        }
        print(json.dumps(found))


def prepare(folder: Path, prompts: int, seed: int) -> None:
    """Writes model, tokenizer, prompts and config."""
    lines = [f"{i} comes after {i - 1}, and {i * i} is its square.\n" for i in range(400)]
    (folder / "text.txt").write_text("".join(lines))
    export_huggingface(RandomSource(MODEL, dtype="float32"), folder / "weights", "float32")
    train_tokenizer([folder / "text.txt"], folder / "weights" / "tokenizer.model", 320)
    draw = random.Random(seed)
    with (folder / "prompts.jsonl").open("w") as file:
        for number in range(prompts):
            record = {"id": number, "prompt": "".join(draw.choice(lines)[: draw.randrange(1, 40)])}
            record["max_tokens"] = draw.randrange(1, 17)
            record["temperature"] = draw.choice([0, 0.7, 1])
            if number % 50 == 7:
                record["temprature"] = 1
            file.write(f"{json.dumps(record)}\n")
    (folder / "job.yaml").write_text(CONFIG.format(folder=folder))


def start(folder: Path, output: str, number: int, count: int) -> subprocess.Popen:
    """Starts one process of the job; its log goes to `folder`."""
    place = dict(zip(VARIABLES, ("localhost:1", str(count), str(number)), strict=True))
    with (folder / f"{output}-{number}.log").open("a") as log:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "grok",
                "batch",
                folder / "job.yaml",
                f"output={folder}/{output}",
            ],
            env={**os.environ, "JAX_PLATFORMS": "cpu", **place},
            stdout=log,
            stderr=log,
        )


def disturbed(folder: Path, kills: int, draw: random.Random, seconds: float) -> int:
    """The job in two processes, killed up to so many times; how often one was killed at work."""
    hosts = [start(folder, "broken", number, 2) for number in range(2)]
    done = 0
    for _ in range(kills):
        time.sleep(draw.uniform(0.1, 1) * seconds / 4)
        victim = draw.randrange(2)
        if hosts[victim].poll() is None:
            hosts[victim].kill()
            done += 1
        hosts[victim].wait()
        hosts[victim] = start(folder, "broken", victim, 2)
    assert [host.wait() for host in hosts] == [0, 0]
    return done


def read(folder: Path) -> list[dict]:
    """All lines of the answers, in order of the files."""
    files = sorted((folder / "answers").iterdir())
    names = [file for file in files if file.suffix == ".jsonl" and file.name[0] != "."]
    return [json.loads(line) for file in names for line in file.read_text().splitlines()]


if __name__ == "__main__":
    main()
