"""Errors meant for people: one sentence that says what was wrong, where, and what would be right.

The command line prints the sentence alone and leaves with the class's exit code; anything else
that escapes is a bug and keeps its stack trace.
"""

# Exit codes of a run that ended as it should.
DONE = 0
SAVED = 75  # asked to stop, everything saved, the same command goes on (EX_TEMPFAIL)


class GrokError(Exception):
    """An error whose message is complete for a user; `exit_code` is what the command returns."""

    exit_code = 1


class ConfigError(GrokError, ValueError):
    """A configuration that cannot work: unknown key, wrong type, impossible combination."""

    exit_code = 2


class DataError(GrokError, ValueError):
    """Text, tokenizer or dataset files that cannot be used as they are."""

    exit_code = 2


class CheckpointError(GrokError, ValueError):
    """Checkpoint or weight files that are missing, damaged, or of another model."""

    exit_code = 2
