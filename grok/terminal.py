"""Sentences on a terminal: its lines break between words, and never within a command to copy."""

import re
import shutil
import textwrap
from typing import IO, Any

BLANK = "\0"  # stands for one within a command


def wrap(text: str, width: int) -> str:
    """The text in lines of at most `width` characters. A word that is longer, and a command in
    backquotes, are not broken: what is copied from a terminal should work."""
    return "\n".join(_wrap_line(line, width) for line in text.split("\n"))


def for_stream(text: str, stream: IO[Any]) -> str:
    """The text wrapped at the width of the terminal that `stream` is; else as it is."""
    return wrap(text, shutil.get_terminal_size().columns) if stream.isatty() else text


def _wrap_line(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    whole = re.sub(r"`[^`]*`", lambda command: command[0].replace(" ", BLANK), line)
    lines = textwrap.wrap(whole, width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace(BLANK, " ")
