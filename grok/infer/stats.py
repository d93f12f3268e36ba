"""Counts of an engine."""

import dataclasses


def _count(meaning: str, total: bool = False) -> int:
    return dataclasses.field(metadata={"meaning": meaning, "total": total})


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Counts of the present state and, where `total`, since the engine was made."""

    tokens_in: int = _count("tokens of prompts, those found in the cache included", total=True)
    tokens_cached: int = _count("tokens of prompts that were found in the cache", total=True)
    tokens_out: int = _count("new tokens", total=True)
    preempted: int = _count("sequences that lost their pages and were computed again", total=True)
    running: int = _count("sequences in slots")
    waiting: int = _count("sequences that wait for a slot")
    pages_used: int = _count("pages of the cache that sequences in slots hold")
    pages_cached: int = _count("pages of the cache that hold prefixes alone")
    pages_free: int = _count("pages of the cache that hold nothing")
