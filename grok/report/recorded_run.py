"""A run as its folder tells it, whatever of it is there: young, dead, old or finished."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grok.config.load import flatten
from grok.config.yaml import parse_yaml
from grok.errors import GrokError
from grok.train.telemetry.event_log import read_events
from grok.train.telemetry.goodput import Goodput, measure
from grok.train.telemetry.metrics_file import read_metrics
from grok.train.telemetry.run_manifest import read_manifest


@dataclasses.dataclass(frozen=True)
class RecordedRun:
    """What a run's folder holds, empty where a file is missing.

    training and validation: lines of `metrics.jsonl`, in order; restarts: the steps at which
    another process took over; config: dotted key and value.
    """

    name: str
    folder: Path
    training: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    restarts: list[int]
    events: list[dict[str, Any]]
    record: dict[str, Any]
    config: dict[str, Any]

    @property
    def steps(self) -> int:
        """Steps of the whole run, as the config wants them; 0 where that is not known."""
        return self.config.get("train.steps", 0)

    @property
    def goodput(self) -> Goodput | None:
        """What the run's time went to; None without an event log."""
        return measure(self.events) if self.events else None

    def series(self, key: str, lines: str = "training") -> tuple[np.ndarray, np.ndarray]:
        """Steps and values (P,) of the lines that have a number under `key`."""
        found = [line for line in getattr(self, lines) if isinstance(line.get(key), int | float)]
        steps_P = np.array([line["step"] for line in found], dtype=float)
        return steps_P, np.array([line[key] for line in found], dtype=float)

    def tokens(self) -> np.ndarray:
        """Tokens seen (P,) at each line of training; NaN where a line does not say."""
        seen = (line.get("tokens_seen") for line in self.training)
        return np.array([sum(s.values()) if isinstance(s, dict) else np.nan for s in seen])

    def groups(self, prefix: str) -> list[str]:
        """Names of the parameter groups that have values under `prefix/NAME`, in order."""
        start = f"{prefix}/"
        keys = dict.fromkeys(key for line in self.training for key in line if key.startswith(start))
        return [key.removeprefix(start) for key in keys]

    def loads(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps (P,), and the share of tokens of each layer's experts (P, L, E). Lines that have
        only the mean over layers count as one layer."""
        key = "expert_load_layers"
        found = [line for line in self.training if key in line]
        if not found:
            key, found = "expert_load", [line for line in self.training if "expert_load" in line]
        # A model has one shape; a line of another is no part of this run.
        found = [line for line in found if np.shape(line[key]) == np.shape(found[-1][key])]
        steps_P = np.array([line["step"] for line in found], dtype=float)
        load = np.array([line[key] for line in found], dtype=float)
        return steps_P, load[:, None] if load.ndim == 2 else load

    def bad_steps(self) -> list[int]:
        """Steps whose update was skipped, or whose loss is no finite number."""
        told = [event["step"] for event in self.events if event["event"] == "skipped"]
        seen = [
            line["step"]
            for line in self.training
            if line.get("skipped") or not np.isfinite(line.get("loss") or 0.0)
        ]
        return sorted({*told, *seen})


def read_run(folder: str | Path) -> RecordedRun:
    """Reads the folder of a run; GrokError where it is none."""
    folder = Path(folder)
    paths = {name: folder / name for name in ("metrics.jsonl", "events.jsonl", "config.yaml")}
    if not any(path.exists() for path in paths.values()):
        raise GrokError(
            f"{folder} is no run's folder: it has neither metrics.jsonl nor config.yaml; a folder "
            "that `grok train` has worked in would work."
        )
    metrics = paths["metrics.jsonl"]
    lines, restarts = as_one_run(read_metrics(metrics) if metrics.exists() else [])
    record = read_manifest(str(folder)) or {}
    config = record.get("config")
    if config is None and paths["config.yaml"].exists():
        config = parse_yaml(paths["config.yaml"].read_text(), str, {})
    return RecordedRun(
        name=folder.resolve().name,
        folder=folder,
        training=[line for line in lines if "loss" in line],
        validation=[line for line in lines if "validation_loss" in line],
        restarts=restarts,
        events=read_events(paths["events.jsonl"]) if paths["events.jsonl"].exists() else [],
        record=record,
        config=dict(flatten(config or {})),
    )


def as_one_run(lines: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[int]]:
    """Lines without those that a restarted process did again, and the steps of the restarts."""
    kept: list[dict[str, Any]] = []
    restarts: list[int] = []
    for line in lines:
        if line.get("event") == "resumed":
            restarts.append(line["step"])
            kept = [earlier for earlier in kept if earlier["step"] <= line["step"]]
        elif "step" in line:
            kept.append(line)
    return kept, restarts
