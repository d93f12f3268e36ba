"""Real processes of `grok` on this machine, as if each were a host."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from grok.cluster import CLUSTER_VARIABLES
from tests.fixtures.network import free_address

# Half of the time of a start would be optimisation of code that runs for seconds.
QUICK_TO_COMPILE = {
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
}


class Hosts:
    """Processes that were started together, each with its own log."""

    def __init__(
        self,
        commands: list[list[str]],
        folder: Path,
        environment: dict | None = None,
        verb: str = "train",
    ):
        """Starts `grok VERB COMMAND` for each of `commands`; logs go to `folder`."""
        address = free_address()
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"host-{number}.log" for number in range(len(commands))]
        self.processes = []
        for number, command in enumerate(commands):
            cluster = zip(
                CLUSTER_VARIABLES, (address, str(len(commands)), str(number)), strict=True
            )
            with self.logs[number].open("w") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "grok", verb, *command],
                    env={**os.environ, **QUICK_TO_COMPILE, **(environment or {}), **dict(cluster)},
                    stdout=log,
                    stderr=log,
                )
            self.processes.append(process)

    def codes(self, timeout: float | None = None) -> list[int]:
        """Waits for all processes; returns their exit codes."""
        return [process.wait(timeout) for process in self.processes]

    def wait_until(self, reached: Callable[[], bool]) -> bool:
        """Waits for a condition; returns whether it held before one of the processes ended."""
        while not reached():
            if any(process.poll() is not None for process in self.processes):
                return reached()
            time.sleep(0.02)
        return True

    def output(self, number: int) -> str:
        """The output of a process so far."""
        return self.logs[number].read_text(errors="replace")

    def running(self) -> bool:
        """True while any of the processes runs."""
        return any(process.poll() is None for process in self.processes)

    def kill(self) -> None:
        """Kills the processes that still run."""
        for process in self.processes:
            process.kill()
            process.wait()
