"""Sentences on terminals of any width."""

import io

from grok.terminal import for_stream, wrap

SENTENCE = (
    "data.tokenizer names no tokenizer; `grok data tokenizer text --out text.model` makes one of "
    "this text, and data.tokenizer=text.model names it."
)


def test_lines_break_between_words_and_not_in_commands():
    lines = wrap(SENTENCE, 60).splitlines()
    assert " ".join(lines) == SENTENCE
    assert max(map(len, lines)) <= 60
    assert any("`grok data tokenizer text --out text.model`" in line for line in lines)
    # A path that is longer than a line stays in one piece, too.
    path = "/a" * 40
    assert f"{path}:" in wrap(f"error: {path}: cannot be read", 30).splitlines()
    assert wrap("first\n  second", 40) == "first\n  second"


def test_a_pipe_gets_sentences_as_they_are():
    assert for_stream(SENTENCE, io.StringIO()) == SENTENCE
