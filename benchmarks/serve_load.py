"""Load test of `grok serve`: hundreds of clients that read streams, some of which disconnect.

    grok serve runs/quickstart engine.max_num_seqs=64 &
    python -m benchmarks.serve_load http://127.0.0.1:8000 --clients 200 --seconds 120 --pid $!

Each client requests one stream after another. Prints errors, tokens per second, p50 and p99 of the
time to the first token and between tokens, and with --pid the server's memory at the start, in the
middle and at the end; ends with a line of JSON. If the server needs a key, set GROK_API_KEYS.
"""

import argparse
import asyncio
import json
import os
import random
import time
from pathlib import Path

import httpx
import numpy as np

GONE = 0.1  # share of the requests whose client leaves in the middle


class Load:
    """Measurements of the clients, and the time until which they send requests."""

    def __init__(self, url: str, seconds: float, seed: int):
        """Begins now."""
        self.until = time.monotonic() + seconds
        self.url, self.random = url, random.Random(seed)
        self.first: list[float] = []
        self.between: list[float] = []
        self.errors: dict[str, int] = {}
        self.ended = self.left = 0

    async def client(self, http: httpx.AsyncClient, model: str) -> None:
        """One client: a request after another until the time is over."""
        while time.monotonic() < self.until:
            vanishing = self.random.random() < GONE
            body = {
                "model": model,
                "prompt": "The " * self.random.randrange(1, 40),
                "max_tokens": self.random.randrange(8, 64),
                "stream": True,
            }
            try:
                await self.one(http, body, vanishing)
            except (httpx.HTTPError, ValueError) as error:
                name = f"{type(error).__name__}: {error}"[:80]
                self.errors[name] = self.errors.get(name, 0) + 1

    async def one(self, http: httpx.AsyncClient, body: dict, vanishing: bool) -> None:
        """One request, read to its end or left after three tokens."""
        last, count = time.monotonic(), 0
        async with http.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if not line or line == "data: [DONE]":
                    continue
                if "error" in json.loads(line.removeprefix("data: ")):
                    raise ValueError(line)
                now = time.monotonic()
                (self.between if count else self.first).append(now - last)
                last, count = now, count + 1
                if vanishing and count == 3:
                    self.left += 1
                    return
        self.ended += 1


def memory(pid: int | None) -> float | None:
    """Resident MB of a process."""
    if pid is None:
        return None
    (line,) = [x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmRSS" in x]
    return round(int(line.split()[1]) / 1000, 1)


async def main() -> None:
    """Runs the clients and prints what they saw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pid", type=int)
    options = parser.parse_args()
    headers = {"Authorization": f"Bearer {os.environ.get('GROK_API_KEYS', 'none').split()[0]}"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(headers=headers, limits=limits, timeout=600) as http:
        model = (await http.get(f"{options.url}/v1/models")).json()["data"][0]["id"]
        load, sizes = Load(options.url, options.seconds, options.seed), [memory(options.pid)]
        clients = [asyncio.create_task(load.client(http, model)) for _ in range(options.clients)]
        await asyncio.sleep(options.seconds / 2)
        sizes.append(memory(options.pid))
        await asyncio.gather(*clients)
        sizes.append(memory(options.pid))
    tokens = len(load.first) + len(load.between)
    results = {
        "ended": load.ended,
        "left": load.left,
        "errors": load.errors,
        "events_per_second": round(tokens / options.seconds, 1),
        "first_token_p50_p99": [round(float(x), 4) for x in np.percentile(load.first, [50, 99])],
        "between_p50_p99": [round(float(x), 4) for x in np.percentile(load.between, [50, 99])],
        "server_MB": sizes,
    }
    print(json.dumps(results))


if __name__ == "__main__":
    asyncio.run(main())
