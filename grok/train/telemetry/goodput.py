"""Goodput: the share of a run's wall time that went into steps which are part of its result.

The wall time is that of all processes that worked on the run, one after the other, and of the gaps
between them, except after one that had finished: that is where the run was over. Steps that a
later process did again, because they were not saved, are lost.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

# Lines that say from which step the run goes on; what was done beyond it is done again.
REWINDS = ("resumed", "rolled_back")
SPANS = ("start", "restore", "compile", "data", "validate", "save", "profile")


@dataclasses.dataclass(frozen=True)
class Goodput:
    """Seconds by what they went to, in the order of `KINDS`.

    useful: steps; lost: steps done again; the spans of `grok.train.telemetry.event_log`; down:
    between processes, from the last line of one that died; other: the rest.
    """

    seconds: dict[str, float]

    @property
    def total(self) -> float:
        """Wall time, seconds."""
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """Goodput, 0 to 1; 0 where no time has passed."""
        return self.seconds["useful"] / self.total if self.total else 0.0


KINDS = ("useful", "lost", *SPANS, "down", "other")


def measure(events: Sequence[dict[str, Any]]) -> Goodput:
    """Adds up the lines of a run's `events.jsonl`."""
    seconds = dict.fromkeys(KINDS, 0.0)
    processes = _processes(events)
    for lines in processes:
        for line in lines:
            if line["event"] in SPANS:
                seconds[line["event"]] += line["seconds"]
    # Backwards: which steps count is known from what came after them.
    kept: float = float("inf")
    for line in reversed(events):
        if line["event"] in REWINDS:
            kept = min(kept, line["step"])
        elif line["event"] == "steps":
            first, last = line["first"], line["last"]
            share = min(1.0, max(0.0, (kept - first) / (last - first)))
            seconds["useful"] += share * line["seconds"]
            seconds["lost"] += (1 - share) * line["seconds"]
    for lines in processes:
        spent = sum(line["seconds"] for line in lines if "seconds" in line)
        seconds["other"] += max(0.0, _end(lines) - lines[0]["time"] - spent)
    for before, after in itertools.pairwise(processes):
        finished = before[-1]["event"] == "ended" and before[-1]["code"] == 0
        if not finished:
            seconds["down"] += max(0.0, after[0]["time"] - _end(before))
    return Goodput(seconds)


def _processes(events: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The lines of each process that worked on the run."""
    processes: list[list[dict[str, Any]]] = []
    for line in events:
        if line["event"] == "began" or not processes:
            processes.append([])
        processes[-1].append(line)
    return processes


def _end(lines: Sequence[dict[str, Any]]) -> float:
    """When a process was last heard of."""
    return max(line["time"] + line.get("seconds", 0.0) for line in lines)
