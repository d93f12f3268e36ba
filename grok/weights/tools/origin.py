"""Origin of the weights in a checkpoint of ours: a run or an import, and adapters on a base."""

from typing import Any

from grok.model.params import describe_lora
from grok.weights.orbax.metadata import read_meta
from grok.weights.orbax.source import LoraSource, OrbaxSource


def checkpoint_facts(source: OrbaxSource | LoraSource) -> dict[str, Any]:
    """Step, import, origin and adapters of a checkpoint, as `Inspection` has them."""
    meta = read_meta(source.step)
    facts: dict[str, Any] = {"step": int(source.step.rstrip("/").rpartition("/")[2])}
    facts["imported_from"] = meta.get("import", {}).get("path")
    facts["checksums"] = len(source.checksums) if isinstance(source, OrbaxSource) else 0
    if facts["imported_from"] is None and "config" in meta:
        facts["origin"] = run_origin(meta)
    if isinstance(source, LoraSource):
        facts["adapters"] = adapters(source)
    return facts


def run_origin(meta: dict[str, Any]) -> str:
    """Beginning and data of the run that saved a checkpoint, from its `meta`."""
    train, data, start = meta["config"]["train"], meta["config"]["data"], meta.get("init_from")
    begin = f"seed {train['seed']}"
    if start:
        begin = f"the weights at {start['path']} ({start['format']})"
    paths = [dataset["path"] for dataset in data["datasets"]] or data["train"]
    text = f"a run of {train['steps']:,} steps from {begin}"
    return f"{text}, on {', '.join(paths)}" if paths else text


def adapters(source: LoraSource) -> str:
    """Adapters of a checkpoint, and the weights that they belong to, in words."""
    run = source.run
    return f"{describe_lora(run.model, run.lora)}; base {source.base.path}"
