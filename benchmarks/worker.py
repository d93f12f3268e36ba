"""A process in another Python environment that answers a line with a line of JSON."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self


class Worker:
    """Runs `python script arguments`, which first prints one line when it is ready. A context
    manager, which ends the process."""

    def __init__(self, python: str, script: Path, *arguments: object):
        command = [python, str(script), *map(str, arguments)]
        pipe = subprocess.PIPE
        self._name = script.name
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate()

    def ask(self, *words: object) -> list[float]:
        """The answer to a line of these words."""
        assert self._process.stdin is not None
        print(*words, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> list[float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self._name} ended with code {self._process.wait()}")
        return json.loads(line)


def make_environment(folder: Path, *packages: str) -> str:
    """Installs packages from the package index into a new environment; returns its Python."""
    uv = shutil.which("uv") or str(Path(__file__).parents[1] / ".uv" / "bin" / "uv")
    python = str(folder / "bin" / "python")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder], check=True)
    install = [uv, "pip", "install", "--quiet", "--python", python, *packages]
    subprocess.run(install, check=True)
    return python
