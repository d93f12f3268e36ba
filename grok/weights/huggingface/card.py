"""README.md of an exported folder, its model card: the weights, and programs that can read them."""

import hashlib
import json
import re
from collections.abc import Sequence

from grok.config.load import flatten
from grok.model.params import describe_lora, num_active_parameters, num_parameters
from grok.weights.huggingface.adapters.adapter import Adapter
from grok.weights.orbax.source import LoraSource
from grok.weights.source import Source

FILE = "README.md"
# By the format that the weights were exported from.
ORIGINS = {
    "xai": "a folder in the release's format (`ckpt-0`)",
    "orbax": "a checkpoint of the grok codebase",
    "huggingface": "another Hugging Face folder",
}


def model_card(
    source: Source,
    adapter: Adapter,
    dtype: str,
    base_weights: str | None = None,
    manifest: tuple[str, bytes] | None = None,
    tokenizer_files: Sequence[str] = (),
) -> str:
    """The card of `source` exported in `dtype`, as Markdown with a YAML head. `base_weights` names
    the origin, by default the release for weights in its format and of its size; `manifest` is the
    name and content of the folder's file on the training data; `tokenizer_files` are there, too."""
    parameters = num_parameters(source.config)
    if base_weights is None and source.format == "xai" and adapter.release:
        base_weights = adapter.release[0] if parameters == adapter.release[1] else None
    licence = [f"license: {adapter.licence}"] if adapter.licence else []
    head = ["---", *licence, "pipeline_tag: text-generation"]
    # The hub links models by names of this form; anything else it would refuse.
    if base_weights and re.fullmatch(r"[\w.-]+/[\w.-]+", base_weights):
        head.append(f"base_model: {base_weights}")
    experts = ["- mixture-of-experts"] if source.config.moe else []
    head += ["tags:", f"- {adapter.name}", *experts, "---"]
    numbers = dict(flatten(adapter.config_numbers(source.config)))
    rows = [f"| {key} | {json.dumps(value)} |" for key, value in numbers.items()]
    active = f"| parameters that a token uses | {num_active_parameters(source.config):,} |"
    table = ["| key | value |", "|---|---|", *rows, active]
    data = "No data manifest came with this export."
    if manifest is not None:
        name, content = manifest
        digest = hashlib.sha256(content).hexdigest()
        data = (
            f"[{name}]({name}) is the data manifest ({len(content):,} bytes, SHA-256 `{digest}`)."
        )
    tokenizer = ", ".join(f"`{name}`" for name in tokenizer_files)
    sections = (
        ("Reading it", adapter.reading_notes(source.config)),
        ("Tokenizer", f"{tokenizer}." if tokenizer else adapter.tokenizer_note),
        ("Base weights", _base(source, dtype, base_weights)),
        ("Config", "\n".join(table)),
        ("Training data", data),
        ("Licence", _licence(adapter)),
    )
    title = f"# A {adapter.family} model of {parameters:,} parameters, in {dtype}"
    body = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in sections)
    return "\n".join(head) + f"\n\n{title}\n\n{body}\n"


def _base(source: Source, dtype: str, base_weights: str | None) -> str:
    origin = ORIGINS.get(source.format, source.path)
    text = base_weights or f"Not stated. They were exported from {origin}."
    if isinstance(source, LoraSource):
        text = base_weights or f"The weights at `{source.base.path}`."
        described = describe_lora(source.run.model, source.run.lora)
        text += f"\n\nLoRA adapters are merged into them: {described}."
    if source.dtype == "int8":
        text += (
            "\n\nThe matrices were int8 with bfloat16 scales. Here they are the products, "
            f"{'exact' if dtype == 'float32' else 'each rounded once'} in {dtype}."
        )
    elif source.dtype != dtype:
        text += f"\n\nThe matrices were {source.dtype} and were converted to {dtype}."
    return text


def _licence(adapter: Adapter) -> str:
    if adapter.licence is None:
        return "Not stated. That of the base weights holds for weights that were made from them."
    return f"{adapter.licence.capitalize()}, as the release of {adapter.family} has it."
