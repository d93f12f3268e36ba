"""Goodput: the share of a run's wall time spent on steps that are part of its result.

The wall time is that of all processes that worked on the run, one after the other, and of the gaps
between them, except after one that had finished the run. Steps that were not saved, so that a later
process repeated them, are lost.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

# Events that set the step from which the run continues; steps beyond it are repeated.
REWINDS = ("resumed", "rolled_back")
SPANS = ("start", "restore", "compile", "data", "validate", "save", "profile")


@dataclasses.dataclass(frozen=True)
class Goodput:
    """Wall time by kind, in the order of `KINDS`.

    useful: steps; lost: repeated steps; the spans of `grok.train.telemetry.event_log`; down: from
    the last line of a process that died to the next process; other: the rest.
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
    # Backwards: whether a step counts depends on what came after it.
    rewound_to: float = float("inf")
    for line in reversed(events):
        if line["event"] in REWINDS:
            rewound_to = min(rewound_to, line["step"])
        elif line["event"] == "steps":
            first, last = line["first"], line["last"]
            share = min(1.0, max(0.0, (rewound_to - first) / (last - first)))
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
    """The time of a process's last sign of life."""
    return max(line["time"] + line.get("seconds", 0.0) for line in lines)
