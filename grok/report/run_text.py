"""Entries of `run.json` in words."""

import datetime
from collections.abc import Mapping
from typing import Any

from grok.errors import DONE, SAVED


def describe_exit(code: int | None) -> str:
    """Meaning of a process's exit code; None where no end is recorded."""
    meanings = {None: "no end recorded", DONE: "finished", SAVED: "asked to stop, saved"}
    return meanings.get(code, f"ended with exit code {code}")


def commit_of(start: Mapping[str, Any]) -> str:
    """The commit that a process ran, and a note where its files had been changed."""
    commit = start.get("commit")
    if commit is None:
        return "unknown"
    return commit[:12] + (" with changes" if start["dirty"] else "")


def format_time(time: str | None) -> str:
    """An ISO time to the minute, in UTC; empty for None."""
    if time is None:
        return ""
    return datetime.datetime.fromisoformat(time).strftime("%Y-%m-%d %H:%M UTC")
