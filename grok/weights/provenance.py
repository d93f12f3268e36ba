"""The origin of weights, as far as their files tell it: for model cards and heads of files."""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

from grok import storage
from grok.config.load import from_dict
from grok.model.params import describe_lora, num_parameters
from grok.weights.checksums import sample_checksum
from grok.weights.source import Source

# The licences of open releases by their names on the hub, as the hub calls the licences.
LICENCES = {
    r"(xai-org|hpcai-tech|keyfan)/grok-1(-hf)?": "apache-2.0",
    r"mistralai/(Mistral-7B|Mixtral-8x)[\w.-]*": "apache-2.0",
    r"meta-llama/Llama-2-[\w.-]+": "llama2",
    r"meta-llama/Meta-Llama-3-[\w.-]+": "llama3",
    r"meta-llama/(Meta-)?Llama-3\.1-[\w.-]+": "llama3.1",
    r"meta-llama/Llama-3\.2-[\w.-]+": "llama3.2",
    r"meta-llama/Llama-3\.3-[\w.-]+": "llama3.3",
    r"xai-org/grok-2": "other",  # the Grok 2 Community License Agreement
}
# Releases in xAI's format, by their parameters.
RELEASES = {315_684_820_992: "xai-org/grok-1"}
# By the format that weights are in, or were imported from.
FORMATS = {
    "xai": "a folder in the release's format (`ckpt-0`)",
    "orbax": "a checkpoint of the grok codebase",
    "huggingface": "a Hugging Face folder",
}


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Origin of weights: `base` says it in a sentence, `repository` its name on the
    hub, if it is there, `checksum` that of a sample of their own values. `step` and `metrics` are
    those of a run's checkpoint, `data` names what it was trained on,
    and `adapters` says which it trained, in words."""

    base: str
    repository: str | None
    checksum: str
    step: int | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    data: tuple[str, ...] = ()
    adapters: str | None = None

    @property
    def licence(self) -> str | None:
        """The licence of a known release, by its name on the hub; None of other weights."""
        known = (i for name, i in LICENCES.items() if re.fullmatch(name, self.repository or ""))
        return next(known, None)


def provenance(source: Source, base_weights: str | None = None) -> Provenance:
    """The origin of a source. `base_weights`, in words, stands before what the files say."""
    checksum = sample_checksum(source)
    if source.format == "xai" and num_parameters(source.config) in RELEASES:
        base_weights = base_weights or RELEASES[num_parameters(source.config)]
    meta = source.meta
    started = meta.get("init_from") or meta.get("import")
    if started is not None:
        where = _place(started["path"])
        base = f"{where}, {FORMATS.get(started['format'], started['format'])}"
        if isinstance(started["checksum"], str) and "init_from" in meta:
            base += f"; checksum of a sample of its values `{started['checksum']}`"
        base += "."
        repository = _repository(started["path"])
    elif "config" in meta:
        base, repository = "None: trained from random weights.", None
    else:
        base = f"Not stated. They were exported from {FORMATS.get(source.format, source.path)}."
        repository = _repository(source.path)
    if base_weights is not None:
        repository = _repository(base_weights) or repository
        base = base_weights if started is None else f"{base_weights}\n\nHere they were {base}"
    if "config" not in meta or "import" in meta:
        return Provenance(base, repository, checksum)
    return Provenance(
        base, repository, checksum, _step(source), _metrics(meta), _data(meta), _adapters(source)
    )


def _place(path: str) -> str:
    """A path for others to read: of a local one its last part alone."""
    return f"`{path if storage.is_remote(path) else os.path.basename(path.rstrip('/'))}`"


def _repository(name: str) -> str | None:
    """ORG/NAME in the name of weights on the hub, with or without hf:// and a revision."""
    found = re.fullmatch(r"(?:hf://)?([\w.-]+/[\w.-]+)(?:@.*)?", name)
    if found is None or os.path.exists(name):
        return None
    return found[1]


def _step(source: Source) -> int | None:
    name = os.path.basename(source.step)
    return int(name) if name.isdecimal() else None


def _metrics(meta: Mapping[str, Any]) -> dict[str, float]:
    metrics = meta.get("metrics") or {}
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def _data(meta: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of texts, and of prepared datasets with the hash of their manifests."""
    texts = [_place(path) for path in meta["config"]["data"]["train"]]
    datasets = [f"{_place(each['path'])} (manifest `{each['hash']}`)" for each in meta["data"]]
    return (*texts, *datasets)


def _adapters(source: Source) -> str | None:
    run = from_dict(source.meta["config"], source.path)
    return describe_lora(run.model, run.lora) if run.lora.rank else None
