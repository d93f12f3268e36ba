"""Renders conversations by a chat template, in a process of its own with limits (`sandbox.py`)."""

import contextlib
import dataclasses
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grok.errors import DataError

SANDBOX = Path(__file__).with_name("sandbox.py")
# Of the processor's time, for one rendering: it takes about a millisecond.
MAX_SECONDS = 2.0
MAX_CHARACTERS = 1 << 24
MAX_BYTES = 1 << 30


class TemplateError(DataError):
    """A template that cannot be used, or that cannot or does not want to write some messages;
    `refused` where the template says so itself, in its own words."""

    def __init__(self, message: str, refused: bool = False):
        super().__init__(message)
        self.refused = refused


class LimitError(TemplateError):
    """A template that takes too much time or memory."""


@dataclasses.dataclass(frozen=True)
class Rendering:
    """A rendering asked for: of the first `count` messages, with what precedes an assistant's next
    message or without."""

    count: int
    add_generation_prompt: bool


class Renderer:
    """The renderings of one template, which sees `fields` beside messages, and in place of the
    clock `now`, an ISO date or time, if given. Raises TemplateError where it is no template."""

    def __init__(
        self,
        template: str,
        fields: Mapping[str, str],
        now: str | None = None,
        max_seconds: float = MAX_SECONDS,
    ):
        self._settings = {
            "template": template,
            "fields": dict(fields),
            "now": now,
            "seconds": max_seconds,
            "max_characters": MAX_CHARACTERS,
            "max_bytes": MAX_BYTES,
        }
        self._seconds = max_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: Callable[[], Any]
        with self._lock:
            self.marks_generation: bool = self._start()["marks_generation"]

    def render(
        self, messages: Sequence[Mapping[str, Any]], renderings: Sequence[Rendering]
    ) -> list[str | TemplateError]:
        """The text of each rendering, or why there is none."""
        request = {
            "messages": list(messages),
            "renderings": [dataclasses.astuple(rendering) for rendering in renderings],
        }
        with self._lock:
            if self._process is None:
                self._start()
            results = self._ask(request)["results"]
        return [
            result["text"]
            if "text" in result
            else TemplateError(result.get("refused") or result["failed"], "refused" in result)
            for result in results
        ]

    def _start(self) -> dict[str, Any]:
        self._process = subprocess.Popen(
            # The interpreter does not look for modules beside the script.
            [sys.executable, "-P", str(SANDBOX)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Ctrl-C is for the process that the user started; this one ends with it.
            process_group=0,
        )
        self._stop = weakref.finalize(self, _end, self._process)
        answer = self._ask(self._settings)
        if "failed" in answer:
            self._stop()
            raise TemplateError(answer["failed"])
        return answer

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if line.endswith(b"\n"):
            return json.loads(line)
        # The kernel ended it; the next request gets another one.
        self._process = None
        self._stop()
        raise LimitError(
            f"it takes more than {self._seconds:g} s or {MAX_BYTES >> 20:,} MiB of memory"
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # what was still to be written
                pipe.close()
    process.kill()
    process.wait()
