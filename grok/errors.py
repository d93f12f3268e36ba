"""Errors meant for people: one sentence that says what was wrong, where, and what would be right.

The command line prints the sentence alone and leaves with the class's exit code; anything else
that escapes is a bug and keeps its stack trace.
"""

import importlib.util

DISTRIBUTION = "grok-jax"  # this package's name in package indexes

# What a run's exit code tells whoever started it; anything else is unexpected, and worth another
# start. docs/train.md has the table.
DONE = 0
REFUSED = 2  # config, data or checkpoint must be changed first: do not restart
DIVERGED = 65  # the numbers went bad: do not restart (EX_DATAERR)
RESTART = 69  # it hung, or lost another process: restart (EX_UNAVAILABLE)
SAVED = 75  # asked to stop, everything saved, it goes on when started again (EX_TEMPFAIL)


class GrokError(Exception):
    """An error whose message is complete for a user; `exit_code` is what the command returns."""

    exit_code = 1


class ConfigError(GrokError, ValueError):
    """A configuration that cannot work: unknown key, wrong type, impossible combination."""

    exit_code = REFUSED


def bad_value(key: str, value: object, problem: str, fix: object) -> ConfigError:
    """The refusal of a key's value, with one that would work."""
    return ConfigError(f"{key}={value} {problem}; {key}={fix} would work.")


class DataError(GrokError, ValueError):
    """Text, tokenizer or dataset files that cannot be used as they are."""

    exit_code = REFUSED


class RequestError(GrokError, ValueError):
    """A request for tokens that cannot be served; `parameter` names what has to change."""

    exit_code = REFUSED

    def __init__(self, parameter: str, message: str):
        super().__init__(message)
        self.parameter = parameter


class CheckpointError(GrokError, ValueError):
    """Checkpoint or weight files that are missing, damaged, or of another model."""

    exit_code = REFUSED


class DamageError(CheckpointError):
    """A checkpoint of ours whose files are not as they were saved."""


class SaveError(CheckpointError):
    """A checkpoint that could not be saved; those before it are as they were."""

    exit_code = RESTART


class FolderInUse(GrokError):
    """A folder in which another process works; when it has ended, the same command works."""

    exit_code = RESTART


class Diverged(GrokError):
    """Gradients or losses that stayed bad from step `first` to step `last`: the same run would go
    the same way again."""

    exit_code = DIVERGED

    def __init__(self, message: str, first: int, last: int):
        super().__init__(message)
        self.first, self.last = first, last


class EngineError(GrokError):
    """An engine that broke down; what it had not answered is lost."""

    exit_code = RESTART


class SilentCorruption(GrokError):
    """Devices that should have the same bits after `step` do not: one of them computes wrongly. The
    same devices would do so again."""

    exit_code = DIVERGED

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class Lost(GrokError):
    """Another process of the run is gone, or never came; all of them start again."""

    exit_code = RESTART


def require_package(package: str, key: str, extra: str) -> None:
    """Raises ConfigError if the package that `key` needs, of this extra, is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{key} needs {package}, not installed here; {how_to_install(extra)}.")


def how_to_install(extra: str) -> str:
    """The clause that says how to add an extra of this package to an environment."""
    pip = f"`pip install '{DISTRIBUTION}[{extra}]'`"
    return f"`make env EXTRAS={extra}` in a clone, or {pip} elsewhere, installs it"
