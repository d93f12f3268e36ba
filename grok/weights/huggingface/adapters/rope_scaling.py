"""Rotary embedding in the config.json of transformers: rope_theta and rope_scaling in version 4,
rope_parameters in version 5; early files call the type of scaling "type"."""

import json
import math
from collections.abc import Mapping
from typing import Any

from grok.config import RopeConfig
from grok.errors import CheckpointError

# Our keys of the scaling of Llama 3.1, and theirs.
LLAMA3_KEYS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_context_length": "original_max_position_embeddings",
}
# By the rope_type of a file; any other is refused.
KEYS_OF_TYPE: dict[str, dict[str, str]] = {"default": {}, "llama3": LLAMA3_KEYS}
THETA, SCALING = "attention.rope.theta", "attention.rope.scaling"


def read_rope(path: str, data: Mapping[str, Any], default_theta: float) -> dict[str, Any]:
    """Our keys, and their values in `data`, the content of the config.json at `path`. Raises
    CheckpointError, with the key, for a type of scaling or an entry that is not known, and where
    two spellings differ."""
    outer = {"rope_theta": data.get("rope_theta")} if data.get("rope_theta") is not None else {}
    readings = {
        name: _read_section(path, name, section, outer, default_theta)
        for name in ("rope_scaling", "rope_parameters")
        if (section := _section(path, data, name))
    }
    first, *others = readings.values() or [_theta(path, outer, default_theta) | {SCALING: None}]
    if others and first != others[0]:
        raise CheckpointError(f"{path}: rope_scaling and rope_parameters differ; one is enough.")
    return first


def _read_section(
    path: str, name: str, section: dict[str, Any], outer: dict[str, Any], default_theta: float
) -> dict[str, Any]:
    """Our keys and values of one of the two objects, with the rope_theta outside of it."""
    inner = {"rope_theta": section.pop("rope_theta")} if "rope_theta" in section else outer
    if outer and inner != outer:
        raise CheckpointError(
            f"{path}: rope_theta is {outer['rope_theta']!r:.40}, and {name}.rope_theta "
            f"{inner['rope_theta']!r:.40}; one is enough."
        )
    theta = _theta(path, inner, default_theta)
    kinds = [section.pop(key) for key in ("rope_type", "type") if key in section]
    kind = kinds[0] if kinds else "missing" if section else "default"
    if not isinstance(kind, str) or kind not in KEYS_OF_TYPE or any(k != kind for k in kinds):
        known = " and ".join(json.dumps(kind) for kind in KEYS_OF_TYPE)
        shown = " and ".join(json.dumps(kind) for kind in kinds) or "missing"
        raise CheckpointError(f"{path}: {name}.rope_type is {shown:.40}; {known} are known.")
    if unknown := sorted(section.keys() - set(KEYS_OF_TYPE[kind].values())):
        raise CheckpointError(
            f"{path}: {name}.{unknown[0]} is {json.dumps(section[unknown[0]]):.40}, which is not "
            f"known of the rope_type {json.dumps(kind)}."
        )
    values: dict[str, Any] = {
        f"{SCALING}.{ours}": _positive(path, f"{name}.{theirs}", section.get(theirs))
        for ours, theirs in KEYS_OF_TYPE[kind].items()
    }
    length = f"{SCALING}.original_context_length"
    if length in values:
        values[length] = int(values[length])
    return theta | (values or {SCALING: None})


def rope_data(rope: RopeConfig) -> dict[str, Any]:
    """The entries of config.json, in the spelling of version 4, which version 5 reads too."""
    if rope.scaling is None:
        return {"rope_theta": float(rope.theta), "rope_scaling": None}
    values = {theirs: getattr(rope.scaling, ours) for ours, theirs in LLAMA3_KEYS.items()}
    return {"rope_theta": float(rope.theta), "rope_scaling": values | {"rope_type": "llama3"}}


def _section(path: str, data: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = data.get(name)
    if section is not None and not isinstance(section, dict):
        right = "it should be null or an object with a rope_type"
        raise CheckpointError(f"{path}: {name} is {json.dumps(section):.40}; {right}.")
    return {key: value for key, value in (section or {}).items() if value is not None}


def _theta(path: str, stated: dict[str, Any], default: float) -> dict[str, Any]:
    if not stated:
        return {THETA: default}
    return {THETA: _positive(path, "rope_theta", stated["rope_theta"])}


def _positive(path: str, name: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        problem = f"is {value!r:.40}" if value is not None else "is missing"
        raise CheckpointError(f"{path}: {name} {problem}; it should be a positive number.")
    return float(value)
