"""Good clients of `grok serve` beside hostile ones.

    grok serve runs/quickstart engine.max_num_seqs=64 max_queue=400 &
    python -m benchmarks.hostile_clients http://127.0.0.1:8000 --pid $!

Good clients request streams as in benchmarks/serve_load.py, alone, then while another process
attacks, and alone again. The attack: connections that send nothing or a part of a request's
headers, each opened again when it is closed; clients that request streams and never read them; and
every kind of benchmarks/hostile_requests.py in turn, whose statuses are checked. Prints a table in
Markdown, and ends with 1 where a good client saw an error, or a hostile one a wrong status.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import socket
import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np

from benchmarks.hostile_requests import KINDS, Kind, post
from benchmarks.serve_load import Load, memory

READ_SECONDS = 60.0  # for an answer to a hostile request
HALF_OPEN = (b"", b"GET /health HTTP/1.1\r\nX: ", b"POST /v1/completions HTTP/1.1\r\n")


class Attack:
    """Hostile clients, until `stop` is set."""

    def __init__(self, url: str, options: argparse.Namespace, stop: Event):
        address = urlsplit(url)
        self._address = address.hostname or "", address.port or 80
        self._options, self._stop = options, stop
        self.statuses: dict[str, dict[int, int]] = {}
        self.opened = {"idle": 0, "unread": 0}
        self.closed = 0  # idle ones, by the server

    async def run(self) -> None:
        """Opens all connections, and attacks."""
        work = [self.hold("idle", HALF_OPEN[i % 3]) for i in range(self._options.idle)]
        unread = {"prompt": "The", "max_tokens": self._options.unread_tokens, "logprobs": 20}
        request = post(json.dumps(unread | {"stream": True, "ignore_eos": True}))
        work += [self.hold("unread", request) for _ in range(self._options.unread)]
        tasks = [asyncio.create_task(task) for task in [*work, self.ask_all()]]
        while not self._stop.is_set():
            await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def hold(self, name: str, data: bytes) -> None:
        """One connection that sends this and does no more, again and again."""
        await asyncio.sleep(random.random())
        while True:
            with socket.socket() as connection:
                connection.setblocking(False)
                # So little fits into it that what is not read stays with the server.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                try:
                    await self._hold(connection, name, data)
                except OSError:
                    await asyncio.sleep(1)

    async def _hold(self, connection: socket.socket, name: str, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connection, self._address)
        self.opened[name] += 1
        await loop.sock_sendall(connection, data)
        if name == "unread":
            await asyncio.sleep(self._options.unread_seconds)
        elif not await loop.sock_recv(connection, 1000):
            self.closed += 1

    async def ask_all(self) -> None:
        """Every kind in turn, at the given rate."""
        for kind in itertools.cycle(KINDS):
            began = time.monotonic()
            status = await self.ask(kind)
            counts = self.statuses.setdefault(kind.name, {})
            counts[status] = counts.get(status, 0) + 1
            await asyncio.sleep(max(0, 1 / self._options.rate - (time.monotonic() - began)))

    async def ask(self, kind: Kind) -> int:
        """The status of the answer to a request; 0 where there is none, -1 where it hangs."""
        writer = None
        try:
            async with asyncio.timeout(READ_SECONDS):
                reader, writer = await asyncio.open_connection(*self._address)
                writer.write(kind.data)
                if kind.leaves:
                    await asyncio.sleep(0.05)
                    return 0
                with contextlib.suppress(OSError):
                    await writer.drain()
                line = await reader.readline()
                return int(line.split()[1]) if line.startswith(b"HTTP/") else 0
        except TimeoutError:
            return -1
        except OSError:
            return 0
        finally:
            if writer is not None:
                writer.transport.abort()


def attack(url: str, options: argparse.Namespace, stop: Event, results: Connection) -> None:
    """Runs the hostile clients in a process of their own, and sends what they saw."""
    hostile = Attack(url, options, stop)
    asyncio.run(hostile.run())
    results.send((hostile.statuses, hostile.opened, hostile.closed))


async def good_clients(url: str, options: argparse.Namespace) -> Load:
    """What the good clients see for so many seconds."""
    headers = {"Authorization": f"Bearer {os.environ.get('GROK_API_KEYS', 'none').split()[0]}"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(headers=headers, limits=limits, timeout=600) as http:
        model = (await http.get(f"{url}/v1/models")).json()["data"][0]["id"]
        load = Load(url, options.seconds, options.seed)
        await asyncio.gather(*(load.client(http, model) for _ in range(options.clients)))
    return load


def row(phase: str, load: Load, megabytes: float | None) -> str:
    """A line of the table."""
    tokens = len(load.first) + len(load.between)
    (first_50, first_99), (between_50, between_99) = (
        np.percentile(values, [50, 99]) * 1000 for values in (load.first, load.between)
    )
    return (
        f"| {phase} | {load.ended} | {sum(load.errors.values())} | {tokens} | {first_50:.0f} / "
        f"{first_99:.0f} | {between_50:.1f} / {between_99:.1f} | {megabytes} |"
    )


def wrong_statuses(statuses: dict[str, dict[int, int]]) -> dict[str, Any]:
    """Kinds whose requests were answered otherwise than is right."""
    right = {kind.name: kind.statuses for kind in KINDS}
    return {
        name: counts
        for name, counts in statuses.items()
        if any(status not in (*right[name], 429) for status in counts)
    }


def main() -> int:
    """Runs the three phases."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--pid", type=int)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--idle", type=int, default=500)
    parser.add_argument("--unread", type=int, default=50)
    parser.add_argument("--unread-tokens", type=int, default=400)
    parser.add_argument("--unread-seconds", type=float, default=45, help="until it is left")
    parser.add_argument("--rate", type=float, default=5, help="hostile requests a second")
    parser.add_argument("--seconds", type=float, default=120, help="of each phase")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    stop, (results, sender) = context.Event(), context.Pipe(duplex=False)
    rows, loads = [], []
    process = context.Process(target=attack, args=(options.url, options, stop, sender))
    for phase in ("alone", "attacked", "alone again"):
        if phase == "attacked":
            process.start()
            time.sleep(5)  # until all connections are open
        loads.append(asyncio.run(good_clients(options.url, options)))
        rows.append(row(phase, loads[-1], memory(options.pid)))
        if phase == "attacked":
            stop.set()
            statuses, opened, closed = results.recv()
            process.join()
    asked = sum(sum(counts.values()) for counts in statuses.values())
    print(
        "| phase | answers | errors | events | first event, p50 / p99, ms | next, ms | server, MB |"
    )
    print("|---|---|---|---|---|---|---|", *rows, sep="\n")
    ratios = [
        np.percentile(load.between, 99) / np.percentile(loads[0].between, 99) for load in loads
    ]
    print(f"\np99 between events, attacked over alone: {ratios[1]:.2f}; afterwards {ratios[2]:.2f}")
    print(
        f"hostile: {asked} requests of {len(statuses)} kinds (of {len(KINDS)}); connections opened"
    )
    print(f"{opened}; the server closed {closed} idle ones")
    wrong = wrong_statuses(statuses)
    for name, counts in wrong.items():
        print(f"wrong: {name}: {counts}")
    errors = [load.errors for load in loads if load.errors]
    for error in errors:
        print(f"good clients saw: {error}")
    return bool(wrong or errors)


if __name__ == "__main__":
    sys.exit(main())
