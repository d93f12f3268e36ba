"""The process in which a chat template runs: `python sandbox.py`, started by `renderer.py`.

It reads lines of JSON and answers each with one. The first has the template, the fields that it
sees, and limits; each other one has messages, and asks for their text and for what assistants wrote
in it. A template comes from whoever published a model, so it runs in Jinja's sandbox, and this
process may use only so much memory and, for each line, time: the kernel ends it where a template
does not."""

import contextlib
import datetime
import json
import re
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

# Halves of surrogate pairs, which no text has that is valid Unicode: they bracket what is inside
# {% generation %}.
BEGIN, END = "\udc01", "\udc02"


class Refused(Exception):
    """A message of the template's own `raise_exception`."""


class TooLong(Exception):
    """A rendering beyond the limit."""


class Generation(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %}, around what an assistant wrote."""

    tags = {"generation"}  # noqa: RUF012  (as Jinja declares it)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Makes a block of the tag that `_mark` renders."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body)
        return call.set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{BEGIN}{caller()}{END}"


def main() -> None:
    """Answers until the other process closes the pipe."""
    settings = json.loads(sys.stdin.buffer.readline())
    with contextlib.suppress(OSError, ValueError):  # some systems have no such limit
        resource.setrlimit(resource.RLIMIT_AS, (settings["max_bytes"], settings["max_bytes"]))
    seconds = settings["seconds"]
    try:
        template, names = limited(
            seconds, lambda: compile_template(settings["template"], settings["now"])
        )
    except jinja2.TemplateSyntaxError as error:
        answer({"failed": f"{error.message} in line {error.lineno}"})
        return
    except Exception as error:
        answer({"failed": describe(error)})
        return
    answer({"reads_tools": "tools" in names})
    for line in sys.stdin.buffer:
        try:
            conversation = Conversation(template, settings, json.loads(line))
            answer(limited(seconds, conversation.result))
        except Refused as error:
            answer({"refused": str(error)})
        except Exception as error:  # whatever a template runs into: names, types, the sandbox
            answer({"failed": describe(error)})


class Conversation:
    """Messages, and a template that writes them."""

    def __init__(self, template: jinja2.Template, settings: dict[str, Any], line: dict[str, Any]):
        self._template = template
        # As transformers' apply_chat_template: tools are there, none where they are not.
        self._fields = settings["fields"] | {"tools": line["tools"]}
        self._max_characters = settings["max_characters"]
        self._marked = "endgeneration" in settings["template"]
        self._messages, self._prompt = line["messages"], line["add_generation_prompt"]

    def result(self) -> dict[str, Any]:
        """The text, first and last character of each answer that is found in it, and the number of
        those that are not."""
        text = self._render(len(self._messages), self._prompt)
        if self._marked:
            text, spans = without_marks(text)
            return {"text": text, "answers": spans, "lost": 0}
        roles = [isinstance(m, dict) and m.get("role") for m in self._messages]
        turns = [number for number, role in enumerate(roles) if role == "assistant"]
        spans = [span for turn in turns if (span := self._find(text, turn)) is not None]
        return {"text": text, "answers": spans, "lost": len(turns) - len(spans)}

    def _find(self, text: str, turn: int) -> tuple[int, int] | None:
        """The answer of this number in a text: behind the prompt for it, or else the messages
        before it, and up to the end of those including it; None where the text does not begin with
        these."""
        stop = self._prefix(text, turn + 1, False)
        if stop is None:
            return None
        for prompt in (True, False):
            start = self._prefix(text, turn, prompt)
            if start is not None and start < stop:
                return start, stop
        return None

    def _prefix(self, text: str, count: int, prompt: bool) -> int | None:
        """Length of the text of the first `count` messages, if the whole begins with it."""
        try:
            beginning = self._render(count, prompt)
        except (TooLong, MemoryError):
            raise
        except Exception:  # it writes no conversation that ends there
            return None
        return len(beginning) if text.startswith(beginning) else None

    def _render(self, count: int, prompt: bool) -> str:
        fields = {"messages": self._messages[:count], "add_generation_prompt": prompt}
        pieces, length = [], 0
        for piece in self._template.generate(self._fields | fields):
            pieces.append(piece)
            length += len(piece)
            if length > self._max_characters:
                raise TooLong(f"it writes more than {self._max_characters:,} characters")
        return "".join(pieces)


def without_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """A text without the marks of {% generation %}, and what was between them."""
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    starts: list[int] = []
    length = 0
    for piece in re.split(f"([{BEGIN}{END}])", marked):
        if piece == BEGIN:
            starts.append(length)
        elif piece == END:
            start = starts.pop() if starts else length
            if not starts and start < length:  # the outermost, and not empty
                spans.append((start, length))
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), spans


def compile_template(text: str, now: str | None) -> tuple[jinja2.Template, set[str]]:
    """The template, with what transformers offers to one, and the names that it reads."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise Refused(message)

    def strftime_now(form: str) -> str:
        time = datetime.datetime.fromisoformat(now) if now else datetime.datetime.now()
        return time.strftime(form)

    def tojson(value: Any, **options: Any) -> str:
        # Jinja's own escapes HTML.
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    names = environment.parse(text).find_all(jinja2.nodes.Name)
    return environment.from_string(text), {name.name for name in names if name.ctx == "load"}


def limited(seconds: float, work: Callable[[], Any]) -> Any:
    """The result of `work`; after so many seconds of the processor's time the process ends."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return work()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def describe(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, MemoryError):
        return "it needs too much memory"
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def answer(value: dict[str, Any]) -> None:
    """Writes a line."""
    sys.stdout.buffer.write(json.dumps(value).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
