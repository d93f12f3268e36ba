"""Types of arguments and options that several commands have."""

import os
from typing import Any

import click

# More is not counted in any of them, and would not fit into the integers of arrays.
MOST = 2 * 10**9
COUNT, COUNT_OR_ZERO = click.IntRange(1, MOST), click.IntRange(0, MOST)


class HomePath(click.Path):
    """A path, whose ~ is the home folder even where the shell leaves it, as in --out=~/data."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path; a refusal where ~NAME names no user."""
        if isinstance(value, str) and value.startswith("~"):
            value = os.path.expanduser(value)
            if value.startswith("~"):
                self.fail(f"{value} is of no user's home; ./{value} would be a name here.")
        return super().convert(value, param, ctx)


PATH = HomePath()
