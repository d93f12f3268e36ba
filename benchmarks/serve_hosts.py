"""Kills and stops processes of a `grok serve` of several hosts, and restarts it.

    python -m benchmarks.serve_hosts --times 10
    python -m benchmarks.serve_hosts --times 0 --clients 200 --seconds 120

Run it from the root of the repository. Four processes with two simulated devices each serve a
random tiny model over loopback. Each time, while clients read streams, one process gets a SIGKILL
or a SIGSTOP in turn: a follower two times of three, else process 0. Prints the exit codes of the
others and the seconds until all had ended, ends the stopped process as a launcher would, starts the
same command again, and prints the seconds until it answers and if its tokens are those of before.
With --clients, runs benchmarks.serve_load against an undisturbed server first. Ends with a line of
JSON.
"""

import argparse
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

from grok.errors import RESTART
from tests.serve.hosts import Server, write_model

COUNT = 4
MOST_SECONDS = 60.0  # until all have ended
JAX_ABORTED = -signal.SIGABRT  # of followers whose process 0 was killed: 134 in a shell
REQUEST = {"model": "tiny", "prompt": "5 comes after", "max_tokens": 30, "seed": 3}


def main() -> None:
    """Runs the load and the faults, and prints what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--clients", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = write_model(folder)
        results: dict = {"processes": COUNT}
        if options.clients:
            results["load"] = under_load(weights, folder, options.clients, options.seconds)
        if options.times:
            rounds = faults(weights, folder, options.times, random.Random(options.seed))
            good = sum(line["ended"] and line["same_tokens"] for line in rounds)
            results |= {"times": options.times, "good": good, "rounds": rounds}
    print(json.dumps(results))


def under_load(weights: Path, folder: Path, clients: int, seconds: float) -> dict:
    """The results of benchmarks.serve_load against one server of several processes."""
    slots = "engine.max_num_seqs=64"
    server = Server(weights, COUNT, folder / "load", slots, f"max_queue={2 * clients}")
    try:
        server.wait_until_answers()
        words = ["--clients", str(clients), "--seconds", str(seconds)]
        pid = str(server.hosts.processes[0].pid)
        command = ["-m", "benchmarks.serve_load", server.url, *words, "--pid", pid]
        done = subprocess.run([sys.executable, *command], capture_output=True, check=True)
        metrics = httpx.get(f"{server.url}/metrics", timeout=60).text.splitlines()
        server.hosts.processes[1].send_signal(signal.SIGTERM)
        codes = server.hosts.codes(MOST_SECONDS)
    finally:
        server.hosts.kill()
    left = [line for line in metrics if line.startswith(("grok_running", "grok_waiting"))]
    return {**json.loads(done.stdout), "left_in_engine": left, "codes_at_the_end": codes}


def faults(weights: Path, folder: Path, times: int, draw: random.Random) -> list[dict]:
    """A server that loses a process `times` times; how each of them went."""
    server = Server(weights, COUNT, folder / "start-0")
    rounds = []
    try:
        server.wait_until_answers()
        before = server.complete(**REQUEST)["choices"]
        for number in range(1, times + 1):
            victim = 0 if number % 3 == 0 else draw.randrange(1, COUNT)
            kind = (signal.SIGKILL, signal.SIGSTOP)[number // 3 % 2 if victim == 0 else number % 2]
            line = {"victim": victim, "signal": kind.name, **lose(server, victim, kind, draw)}
            server = Server(weights, COUNT, folder / f"start-{number}")
            line["seconds_until_it_answers"] = round(server.wait_until_answers(), 1)
            line["same_tokens"] = server.complete(**REQUEST)["choices"] == before
            rounds.append(line)
            print(f"{number}: {line}", file=sys.stderr, flush=True)
    finally:
        server.hosts.kill()
    return rounds


def lose(server: Server, victim: int, kind: signal.Signals, draw: random.Random) -> dict:
    """Sends a signal to one process while clients read; exit codes and seconds of the others."""
    clients = [threading.Thread(target=read_stream, args=[server.url]) for _ in range(8)]
    for client in clients:
        client.start()
    time.sleep(draw.uniform(0.2, 1))
    began = time.monotonic()
    processes = server.hosts.processes
    processes[victim].send_signal(kind)
    others = [process for index, process in enumerate(processes) if index != victim]
    codes: list[int | None] = []
    for process in others:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, began + MOST_SECONDS - time.monotonic()))
        codes.append(process.returncode)
    seconds = time.monotonic() - began
    server.hosts.kill()
    for client in clients:
        client.join()
    expected = {RESTART, JAX_ABORTED} if victim == 0 else {RESTART}
    return {"codes": codes, "seconds": round(seconds, 1), "ended": expected.issuperset(codes)}


def read_stream(url: str) -> None:
    """Reads streams until the server is gone."""
    body = {"model": "tiny", "prompt": "The ", "max_tokens": 100, "stream": True}
    with contextlib.suppress(httpx.HTTPError):
        while True:
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=90) as answer:
                for _ in answer.iter_lines():
                    pass


if __name__ == "__main__":
    main()
