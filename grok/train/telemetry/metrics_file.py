"""`metrics.jsonl`: the metrics of a run, as lines of JSON."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

# JSON lacks these numbers; they are written as in Protocol Buffers' JSON.
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
# Decimals of the expert loads per layer: L x E of them are the bulk of each line.
LOAD_DIGITS = 4


class MetricsFile:
    """`metrics.jsonl` of a run: one JSON object a line, each with the `step` it belongs to."""

    def __init__(self, path: Path | None, first_step: int):
        """The file at `path` (None: writes nothing). Entering it drops the lines after step
        `first_step`, which were written before a crash and are about to be repeated."""
        self._path, self._first_step = path, first_step

    def __enter__(self) -> "MetricsFile":
        if self._path is None:
            return self
        self.truncate(self._first_step)
        self._file = self._path.open("a", buffering=1)
        return self

    def __exit__(self, *_: object) -> None:
        if self._path is not None:
            self._file.close()

    def write(self, step: int, **values: Any) -> None:
        """Appends one line; it is in the file when this returns."""
        if self._path is not None:
            self._file.write(_to_line({"step": step, **values}))

    def truncate(self, after: int) -> None:
        """Drops the lines of steps after step `after`."""
        if self._path is not None and self._path.exists():
            lines = [line for line in read_metrics(self._path) if line["step"] <= after]
            self._path.write_text("".join(map(_to_line, lines)))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, without a last line that a crash cut short."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(_decode_non_finite(json.loads(line)))
        except json.JSONDecodeError:
            break
    return lines


def to_plain(metrics: Mapping[str, jax.Array]) -> dict[str, Any]:
    """Waits for a step's metrics; returns them as Python numbers and lists.

    A float32 becomes the shortest decimal that reads back as the same float32; expert loads per
    layer are rounded.
    """
    values = {}
    for name, value in jax.device_get(dict(metrics)).items():
        if name == "expert_load_layers":
            values[name] = np.round(value.astype(np.float64), LOAD_DIGITS).tolist()
        else:
            values[name] = _shortest(value)
    return values


def _to_line(values: dict[str, Any]) -> str:
    return json.dumps(_encode_non_finite(values), allow_nan=False) + "\n"


def _shortest(value: np.ndarray) -> Any:
    if value.ndim:
        return [_shortest(item) for item in value]
    return float(str(value)) if value.dtype == np.float32 else value.item()


def _encode_non_finite(value: Any) -> Any:
    """Replaces numbers that JSON lacks by text."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {name: _encode_non_finite(item) for name, item in value.items()}
    return [_encode_non_finite(item) for item in value] if isinstance(value, list) else value


def _decode_non_finite(value: Any) -> Any:
    """The inverse of `_encode_non_finite`."""
    if isinstance(value, str):
        return NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {name: _decode_non_finite(item) for name, item in value.items()}
    return [_decode_non_finite(item) for item in value] if isinstance(value, list) else value
