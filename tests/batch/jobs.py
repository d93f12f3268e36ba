"""Jobs of `grok batch` on a tiny model, in this process and in others."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from grok.batch.runner import Replica, run
from grok.config.infer import BatchConfig
from grok.infer import loader
from tests.infer.fake_engine import FakeEngine

# `grok batch` with an engine that needs no model, which before its n-th step sends its process a
# signal.
FAKED = """
import os
from grok.cli.main import main
from grok.infer import loader
from tests.batch.jobs import Breaking

def stop():
    os.kill(os.getpid(), int(os.environ["GROK_SIGNAL"]))

at = int(os.environ["GROK_SIGNAL_AT"])
loader.ServedModel.engine = lambda self, log: Breaking(self.tokenizer, at, stop)
main()
"""


class Killed(BaseException):
    """Stands for what ends a process at any moment."""


class Breaking(FakeEngine):
    """Calls `stop` before its step number `at`."""

    def __init__(self, tokenizer, at: int, stop: Callable[[], None]):
        super().__init__(tokenizer)
        self._at, self._stop, self._steps = at, stop, 0

    def step(self):
        self._steps += 1
        if self._steps == self._at:
            self._stop()
        return super().step()


def write_lines(path: Path, records: list) -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def answer(config: BatchConfig, monkeypatch, killed_at: int = 0) -> list[dict]:
    """Runs a job here with the engine without a model, perhaps until Killed; its lines."""

    def kill() -> None:
        raise Killed

    monkeypatch.setattr(
        loader.ServedModel, "engine", lambda self, log: Breaking(self.tokenizer, killed_at, kill)
    )
    run(config, Replica(0, 1, True, False))
    return lines(Path(config.output))


def lines(output: Path) -> list[dict]:
    files = sorted((output / "answers").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


class Process:
    """`grok batch WORDS` with the engine without a model, as one of several hosts."""

    def __init__(self, words: list[str], number: int, count: int, at: int = 0, signal: int = 9):
        cluster = {"GROK_COORDINATOR": "localhost:1", "GROK_NUM_PROCESSES": str(count)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", FAKED, "batch", *words],
            cwd=Path(__file__).resolve().parents[2],
            env={
                **os.environ,
                **cluster,
                "GROK_PROCESS_ID": str(number),
                "GROK_SIGNAL_AT": str(at),
                "GROK_SIGNAL": str(int(signal)),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self) -> tuple[int, str]:
        """Waits for it; its exit code, and what it said."""
        said, _ = self._process.communicate(timeout=120)
        return self._process.returncode, said
