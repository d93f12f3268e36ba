"""Repeatedly kills a `grok batch` of two processes, and compares its answers.

    python -m benchmarks.batch_kills --prompts 5000 --kills 10

Run it from the root of the repository. A random tiny model answers prompts of many lengths and
parameters, some of them invalid: once undisturbed in one process, and once in two processes, one
of which gets a SIGKILL at a random moment and is restarted. Prints how many requests are answered,
how often each, and whether the lines are the same; ends with a line of JSON. Progress goes to
stderr.
"""

import argparse
import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from grok.cluster import CLUSTER_VARIABLES
from tests.serve.hosts import TEXT, write_model

CONFIG = """
weights: {folder}/tiny
input: [{folder}/prompts.jsonl]
output: {folder}/answers
mesh: {{data: 1, simulated_devices: 1}}
engine: {{max_num_seqs: 32}}
compute_dtype: float32
shard_size: {shard}
"""
SHARD = 50


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
        wait(folder, "straight", [start(folder, "straight", 0, 1)])
        seconds = [time.monotonic() - began]
        kills = disturbed(folder, options.prompts, options.kills, random.Random(options.seed))
        seconds.append(time.monotonic() - began - seconds[0])
        straight, broken = (read(folder / name) for name in ("straight", "broken"))
        times = collections.Counter(collections.Counter(line["index"] for line in broken).values())
        results = {
            "prompts": options.prompts,
            "kills": kills,
            "seconds_undisturbed_and_killed": [round(elapsed, 1) for elapsed in seconds],
            "answered": sum("choices" in line for line in broken),
            "failed": sum("error" in line for line in broken),
            "times_each": dict(times),
            "equal": straight == broken and len(broken) == options.prompts,
        }
        print(json.dumps(results))


def prepare(folder: Path, prompts: int, seed: int) -> None:
    """Writes model, tokenizer, prompts and config."""
    write_model(folder)
    lines = TEXT.splitlines(keepends=True)
    draw = random.Random(seed)
    with (folder / "prompts.jsonl").open("w") as file:
        for number in range(prompts):
            record = {"id": number, "prompt": "".join(draw.choice(lines)[: draw.randrange(1, 40)])}
            record["max_tokens"] = draw.randrange(1, 17)
            record["temperature"] = draw.choice([0, 0.7, 1])
            if number % 50 == 7:
                record["temprature"] = 1
            file.write(f"{json.dumps(record)}\n")
    (folder / "job.yaml").write_text(CONFIG.format(folder=folder, shard=SHARD))


def start(folder: Path, output: str, number: int, count: int) -> subprocess.Popen:
    """Starts one process of the job; its log goes to `folder`."""
    cluster = dict(zip(CLUSTER_VARIABLES, ("localhost:1", str(count), str(number)), strict=True))
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
            env={**os.environ, "JAX_PLATFORMS": "cpu", **cluster},
            stdout=log,
            stderr=log,
        )


def disturbed(folder: Path, prompts: int, kills: int, draw: random.Random) -> int:
    """The job in two processes, of which one is killed so many times, soon after shards drawn at
    random; how often one was at work when it was killed."""
    shards = -(-prompts // SHARD)
    moments = sorted(draw.randrange(shards) for _ in range(kills))
    hosts = [start(folder, "broken", number, 2) for number in range(2)]
    at_work = 0
    for moment in moments:
        while len(done(folder, "broken")) < moment and any(host.poll() is None for host in hosts):
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 1))
        alive = [number for number, host in enumerate(hosts) if host.poll() is None]
        if not alive:
            break
        victim = draw.choice(alive)
        hosts[victim].kill()
        at_work += hosts[victim].wait() == -signal.SIGKILL
        finished = len(done(folder, "broken"))
        print(f"process {victim} killed, {finished} of {shards} shards done", file=sys.stderr)
        hosts[victim] = start(folder, "broken", victim, 2)
    wait(folder, "broken", hosts)
    return at_work


def wait(folder: Path, output: str, hosts: list[subprocess.Popen]) -> None:
    """Waits for processes, telling every ten seconds how far they are; ends where one failed."""
    while None in [host.poll() for host in hosts]:
        time.sleep(10)
        print(f"{output}: {len(done(folder, output))} shards done", file=sys.stderr)
    for number, host in enumerate(hosts):
        if host.returncode:
            sys.exit((folder / f"{output}-{number}.log").read_text())


def done(folder: Path, output: str) -> list[Path]:
    """Files of answers, which are whole, in their order."""
    return sorted((folder / output / "answers").glob("[0-9]*.jsonl"))


def read(folder: Path) -> list[dict]:
    """All lines of the answers, in order of the files."""
    files = done(folder.parent, folder.name)
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


if __name__ == "__main__":
    main()
