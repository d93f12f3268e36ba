"""Help of the groups of commands, and the examples in it."""

import shlex

import click
import pytest
from click.testing import CliRunner

from grok.cli.groups import EXAMPLES, SUBJECTS
from grok.cli.main import main


def test_every_command_has_a_subject_and_an_example():
    assert sorted(main.commands) == sorted(name for part in SUBJECTS.values() for name in part)
    paths = []
    for name, command in main.commands.items():
        inner = command.commands if isinstance(command, click.Group) else [None]
        paths += [f"{name} {sub}" if sub else name for sub in inner]
    assert sorted(paths) == sorted(EXAMPLES)


@pytest.mark.parametrize("path", EXAMPLES)
def test_examples_are_shown_and_are_commands(path):
    words = path.split()
    result = CliRunner().invoke(main, [*words, "--help"])
    assert result.output.endswith(f"  Example:\n    {EXAMPLES[path]}\n")
    command = main
    for word in words:
        command = command.commands[word]
    arguments = shlex.split(EXAMPLES[path])[1 + len(words) :]
    command.make_context(path, arguments)  # raises where an option or an argument is wrong


@pytest.mark.parametrize("group", [[], ["data"], ["import"], ["export"]])
def test_sentences_are_not_cut(group):
    output = CliRunner().invoke(main, [*group, "--help"]).output
    assert "..." not in output.partition("Options:")[2]
    assert max(map(len, output.splitlines())) <= 80
