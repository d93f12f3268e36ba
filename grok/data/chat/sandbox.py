"""The process in which a chat template runs: `python sandbox.py`, started by `renderer.py`.

It reads lines of JSON and answers each with one. The first has the template, the fields that it
sees, and limits; each other one has messages and which renderings of them are asked for. A template
comes from whoever published a model, so it runs in Jinja's sandbox, and this process may use only
so much memory and, for each rendering, time: the kernel ends it where a template does not."""

import contextlib
import datetime
import json
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
    seconds, max_characters = settings["seconds"], settings["max_characters"]
    try:
        template = limited(seconds, lambda: compile_template(settings["template"], settings["now"]))
    except jinja2.TemplateSyntaxError as error:
        answer({"failed": f"{error.message} in line {error.lineno}"})
        return
    except Exception as error:
        answer({"failed": describe(error)})
        return
    answer({"marks_generation": "endgeneration" in settings["template"]})

    def result(fields: dict[str, Any]) -> dict[str, str]:
        try:
            return {"text": limited(seconds, lambda: render(template, fields, max_characters))}
        except Refused as error:
            return {"refused": str(error)}
        except Exception as error:  # whatever a template runs into: names, types, the sandbox
            return {"failed": describe(error)}

    for line in sys.stdin.buffer:
        request = json.loads(line)
        results = []
        for count, prompt in request["renderings"]:
            fields = {"messages": request["messages"][:count], "add_generation_prompt": prompt}
            results.append(result(settings["fields"] | fields))
        answer({"results": results})


def compile_template(text: str, now: str | None) -> jinja2.Template:
    """The template, with what transformers offers to one."""
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
    return environment.from_string(text)


def render(template: jinja2.Template, fields: dict[str, Any], max_characters: int) -> str:
    """A rendering; TooLong as soon as it is."""
    pieces, length = [], 0
    for piece in template.generate(fields):
        pieces.append(piece)
        length += len(piece)
        if length > max_characters:
            raise TooLong(f"it writes more than {max_characters:,} characters")
    return "".join(pieces)


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
