"""A run as its folder records it, at any stage: just started, interrupted or finished."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grok.config.load import flatten
from grok.config.yaml import parse_yaml
from grok.errors import GrokError
from grok.train.telemetry.event_log import Goodput, measure_goodput, read_events
from grok.train.telemetry.metrics_file import read_metrics
from grok.train.telemetry.run_manifest import read_manifest

# Beginnings of the metrics of validation passes.
MEASURED = ("validation_", "tasks/")


@dataclasses.dataclass(frozen=True)
class RecordedRun:
    """Content of a run's folder, empty where a file is missing. training, validation: lines of
    `metrics.jsonl`; restarts: steps at which a new process took over; config: by dotted key."""

    name: str
    folder: Path
    training: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    restarts: list[int]
    events: list[dict[str, Any]]
    manifest: dict[str, Any]
    config: dict[str, Any]

    @property
    def last_step(self) -> int:
        """The last step that is recorded anywhere."""
        logged = [line["step"] for line in (*self.training, *self.validation)]
        ended = [start["last_step"] or 0 for start in self.manifest.get("starts", ())]
        return max((*logged, *ended), default=0)

    @property
    def goodput(self) -> Goodput | None:
        """Wall time by what it was spent on; None without an event log."""
        return measure_goodput(self.events) if self.events else None

    def series(self, key: str, kind: str = "training") -> tuple[np.ndarray, np.ndarray]:
        """Steps and values (P,) of the training or validation lines with a number under `key`."""
        lines = [line for line in getattr(self, kind) if isinstance(line.get(key), int | float)]
        steps_P = np.array([line["step"] for line in lines], dtype=float)
        return steps_P, np.array([line[key] for line in lines], dtype=float)

    def tokens(self) -> np.ndarray:
        """Tokens seen (P,) at each training line; NaN where a line has none."""
        counts = (line.get("tokens_seen") for line in self.training)
        return np.array([sum(c.values()) if isinstance(c, dict) else np.nan for c in counts])

    def groups(self, prefix: str, kind: str = "training") -> list[str]:
        """Names that have values under `prefix/NAME` in training or validation lines, in order."""
        start, lines = f"{prefix}/", getattr(self, kind)
        keys = dict.fromkeys(key for line in lines for key in line if key.startswith(start))
        return [key.removeprefix(start) for key in keys]

    def loads(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps (P,), and shares of each expert (P, L, E); a mean over layers counts as a layer."""
        key = "expert_load_layers"
        lines = [line for line in self.training if key in line]
        if not lines:
            key, lines = "expert_load", [line for line in self.training if "expert_load" in line]
        # A model has one shape; a line of another is no part of this run.
        lines = [line for line in lines if np.shape(line[key]) == np.shape(lines[-1][key])]
        steps_P = np.array([line["step"] for line in lines], dtype=float)
        load = np.array([line[key] for line in lines], dtype=float)
        return steps_P, load[:, None] if load.ndim == 2 else load

    def bad_steps(self) -> list[int]:
        """Steps whose update was skipped, or whose loss is not finite."""
        lines = self.training
        bad = (x.get("skipped") or not np.isfinite(x.get("loss") or 0.0) for x in lines)
        return sorted({line["step"] for line, is_bad in zip(lines, bad, strict=True) if is_bad})


def read_run(folder: str | Path) -> RecordedRun:
    """Reads the folder of a run; GrokError where it is none."""
    folder = Path(folder)
    names = ("metrics.jsonl", "events.jsonl", "config.yaml")
    metrics, events, config_file = (folder / name for name in names)
    if not any(path.exists() for path in (metrics, events, config_file)):
        raise GrokError(
            f"{folder} is no run's folder: it has neither metrics.jsonl nor config.yaml; a folder "
            "that `grok train` has worked in would work."
        )
    lines, restarts = drop_redone_steps(read_metrics(metrics) if metrics.exists() else [])
    manifest = read_manifest(str(folder)) or {}
    config = manifest.get("config")
    if config is None and config_file.exists():
        config = parse_yaml(config_file.read_text(encoding="utf-8-sig"), str, {})
    return RecordedRun(
        name=folder.resolve().name,
        folder=folder,
        training=[line for line in lines if "loss" in line],
        validation=[line for line in lines if any(key.startswith(MEASURED) for key in line)],
        restarts=restarts,
        events=read_events(events) if events.exists() else [],
        manifest=manifest,
        config=dict(flatten(config or {})),
    )


def drop_redone_steps(lines: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[int]]:
    """Metrics lines without those that a restarted process wrote again, and the restarts' steps."""
    result, restarts = list[dict[str, Any]](), list[int]()
    for line in lines:
        if line.get("event") == "resumed":
            restarts.append(line["step"])
            result = [earlier for earlier in result if earlier["step"] <= line["step"]]
        elif "step" in line:
            result.append(line)
    return result, restarts


def final_points(points: int) -> int:
    """Number of the last points, a tenth of all, that count as a run's end."""
    return max(1, round(0.1 * points))


def imbalance(load_PLE: np.ndarray) -> np.ndarray:
    """Load of the busiest expert over the mean (P,), averaged over layers: 1 where all have the
    same, E where one has all."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (load_PLE.max(axis=2) / load_PLE.mean(axis=2)).mean(axis=1)
