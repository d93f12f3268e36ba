"""`metrics.jsonl`: the metrics of a run, as lines of JSON."""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

# JSON lacks these numbers; they are written as in Protocol Buffers' JSON.
QUOTED_NON_FINITE = re.compile(r'"(NaN|-?Infinity)"(?!:)')
LOAD_DIGITS = 4  # decimals of the L x E expert loads, which are the bulk of each line


class MetricsFile:
    """`metrics.jsonl` of a run: one JSON object a line, each with the `step` it belongs to."""

    def __init__(self, path: Path | None, first_step: int):
        """The file at `path` (None: writes nothing). Entering it drops the lines after step
        `first_step`, which were written before a crash and are about to be repeated."""
        self._path, self._first_step = path or Path(os.devnull), first_step

    def __enter__(self) -> "MetricsFile":
        self.truncate(self._first_step)
        self._file = self._path.open("a", buffering=1)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, step: int, **values: Any) -> None:
        """Appends one line; it is in the file when this returns."""
        self._file.write(_to_line({"step": step, **values}))

    def truncate(self, after: int) -> None:
        """Drops the lines of steps after step `after`."""
        if self._path.exists():
            lines = [line for line in read_metrics(self._path) if line["step"] <= after]
            self._path.write_text("".join(map(_to_line, lines)))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, without a last line that a crash cut short."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(QUOTED_NON_FINITE.sub(r"\1", line)))
        except json.JSONDecodeError:
            break
    return lines


def to_plain(metrics: Mapping[str, jax.Array]) -> dict[str, Any]:
    """Waits for a step's metrics; returns them as Python numbers and lists. A float32 becomes the
    shortest decimal that reads back as the same float32; expert loads per layer are rounded."""
    values = jax.device_get(dict(metrics))
    if (load_LE := values.get("expert_load_layers")) is not None:
        values["expert_load_layers"] = np.round(load_LE.astype(np.float64), LOAD_DIGITS)
    return {name: _shortest(value) for name, value in values.items()}


def _to_line(values: dict[str, Any]) -> str:
    return json.dumps(_quote_non_finite(values), allow_nan=False) + "\n"


def _shortest(value: np.ndarray) -> Any:
    if value.ndim:
        return [_shortest(item) for item in value]
    return float(str(value)) if value.dtype == np.float32 else value.item()


def _quote_non_finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    if isinstance(value, dict):
        return {name: _quote_non_finite(item) for name, item in value.items()}
    return [_quote_non_finite(item) for item in value] if isinstance(value, list) else value
