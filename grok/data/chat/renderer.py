"""Renders conversations by a chat template, in a process of its own with limits (`sandbox.py`)."""

import contextlib
import itertools
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grok.errors import DataError

SANDBOX = Path(__file__).with_name("sandbox.py")
# Of the processor's time, for one conversation: it takes about a millisecond.
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


class Span(NamedTuple):
    """The characters of a text that an assistant wrote."""

    start: int
    stop: int


class Rendering(NamedTuple):
    """The text of a conversation, the answers that are found in it in order, and the number of
    those that are not."""

    text: str
    answers: list[Span]
    lost: int


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
        self.reads_tools = False
        with self._lock:
            self._start()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Rendering:
        """The text of the messages, with what precedes an assistant's next one or without. Raises
        TemplateError where the template does not write them."""
        request = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        request["tools"] = tools
        with self._lock:
            if self._process is None:
                self._start()
            result = self._ask(request)
        if "text" not in result:
            raise TemplateError(result.get("refused") or result["failed"], "refused" in result)
        spans: list[Span] = []
        for span in itertools.starmap(Span, result["answers"]):
            if not spans or spans[-1].stop <= span.start:
                spans.append(span)
        return Rendering(
            result["text"], spans, result["lost"] + len(result["answers"]) - len(spans)
        )

    def _start(self) -> None:
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
        self.reads_tools = answer["reads_tools"]

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
