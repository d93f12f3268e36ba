"""The group of commands: help without anything heavy, and how errors leave it."""

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from grok import __version__
from grok.cli.main import main
from grok.errors import CheckpointError, ConfigError, GrokError


def test_help_imports_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import grok.cli.main"],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "click" in imported
    heavy = {"jax", "flax", "numpy", "pydantic", "rich", "ruamel", "optax", "orbax", "grain"}
    assert not imported & heavy


def test_help_lists_the_commands():
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    assert "config" in result.stdout


def test_every_command_has_help():
    for name in main.commands:
        result = CliRunner().invoke(main, [name, "--help"])
        assert result.exit_code == 0
        assert result.stdout.startswith(f"Usage: grok {name}")


def test_version():
    assert CliRunner().invoke(main, ["--version"]).stdout == f"grok, version {__version__}\n"


@pytest.mark.parametrize("args", [["nope"], ["config"], ["--nope"]])
def test_wrong_usage_exits_with_2(args):
    result = CliRunner().invoke(main, args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: grok" in result.stderr


def run_command_that_raises(error, monkeypatch):
    @click.command()
    def failing():
        raise error

    monkeypatch.setitem(main.commands, "failing", failing)
    return CliRunner().invoke(main, ["failing"])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (GrokError("It broke."), 1),
        (ConfigError("It broke."), 2),
        (CheckpointError("It broke."), 2),
    ],
)
def test_an_error_for_people_is_one_line_without_a_trace(error, code, monkeypatch):
    result = run_command_that_raises(error, monkeypatch)
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", "error: It broke.\n")


def test_a_bug_keeps_its_trace(monkeypatch):
    result = run_command_that_raises(ValueError("a bug"), monkeypatch)
    assert isinstance(result.exception, ValueError)


def test_ctrl_c_exits_with_130(monkeypatch):
    result = run_command_that_raises(KeyboardInterrupt(), monkeypatch)
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
