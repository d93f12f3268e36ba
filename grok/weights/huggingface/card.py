"""README.md of an exported folder, its model card: the weights, their origin, and programs that can
read them."""

import hashlib
import json
from collections.abc import Sequence

from grok.config.load import flatten
from grok.config.model import QUANTIZED_DTYPES
from grok.model.params import num_active_parameters, num_parameters
from grok.weights.huggingface import compressed
from grok.weights.huggingface.adapters.adapter import Adapter
from grok.weights.provenance import Provenance
from grok.weights.source import Source

FILE = "README.md"
# What the hub wants of a licence that it has no word for, by repository.
OTHER_LICENCES = {
    "xai-org/grok-2": (
        "license_name: grok-2-community",
        "license_link: https://huggingface.co/xai-org/grok-2/blob/main/LICENSE",
    )
}


def model_card(
    source: Source,
    adapter: Adapter,
    dtype: str,
    origin: Provenance,
    manifest: tuple[str, bytes] | None = None,
    tokenizer_files: Sequence[str] = (),
    licence: str | None = None,
) -> str:
    """The card of `source` exported in `dtype`, as Markdown with a YAML head. `manifest` is
    the name and content of the folder's file on the training data; `tokenizer_files` are there,
    too. `licence` stands before that of the `origin`."""
    experts = ("- mixture-of-experts",) if source.config.moe else ()
    lora: tuple[str, ...] = ()
    adapters: list[tuple[str, str]] = []
    if origin.adapters is not None:
        lora = ("- lora",)
        merged = "They are added to the base weights here."
        adapters = [("Adapters", f"LoRA adapters: {origin.adapters}. {merged}")]
    tags = ("tags:", f"- {adapter.name}", *experts, *lora)
    head = ("---", *_head(origin, licence), *tags, "---")
    numbers = dict(flatten(adapter.config_numbers(source.config)))
    rows = [f"| {key} | {json.dumps(value)} |" for key, value in numbers.items()]
    active = f"| parameters that a token uses | {num_active_parameters(source.config):,} |"
    table = ["| key | value |", "|---|---|", *rows, active]
    tokenizer = ", ".join(f"`{name}`" for name in tokenizer_files)
    sections = (
        ("Reading it", adapter.reading_notes(source.config)),
        ("Tokenizer", f"{tokenizer}." if tokenizer else adapter.tokenizer_note),
        ("Base weights", _base(source, dtype, origin)),
        *adapters,
        ("Config", "\n".join(table)),
        ("Training", _training(origin, manifest)),
        ("Licence", _licence(origin, licence)),
    )
    parameters = num_parameters(source.config)
    title = f"# A {adapter.family} model of {parameters:,} parameters, in {dtype}"
    body = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in sections)
    return "\n".join(head) + f"\n\n{title}\n\n{body}\n"


def _head(origin: Provenance, licence: str | None) -> list[str]:
    """Lines of the YAML head: licence, task and base."""
    lines = []
    if known := licence or origin.licence:
        lines.append(f"license: {known}")
    if known == "other":
        lines += OTHER_LICENCES.get(origin.repository or "", ())
    lines.append("pipeline_tag: text-generation")
    # The hub links models by names of this form; anything else it would refuse.
    if origin.repository:
        lines.append(f"base_model: {origin.repository}")
    return lines


def _base(source: Source, dtype: str, origin: Provenance) -> str:
    text = origin.base
    if dtype in compressed.PACKED_DTYPES:
        which = "Those of attention, MLP" if dtype == "int4_all" else "Those of MLP"
        text += (
            f"\n\nThe matrices were {source.dtype}. {which} and experts are int4 here, with a "
            "bfloat16 scale for every 128 inputs of an output, packed as compressed-tensors has "
            "them; all else is bfloat16."
        )
    elif source.dtype in QUANTIZED_DTYPES:
        text += (
            f"\n\nThe matrices were {source.dtype} with bfloat16 scales. Here they are the "
            f"products, {'exact' if dtype == 'float32' else 'each rounded once'} in {dtype}."
        )
    elif source.dtype != dtype:
        text += f"\n\nThe matrices were {source.dtype} and were converted to {dtype}."
    return f"{text}\n\nChecksum of a sample of the values that were exported: `{origin.checksum}`."


def _training(origin: Provenance, manifest: tuple[str, bytes] | None) -> str:
    lines = []
    if origin.step is not None:
        lines.append(f"{origin.step:,} steps by the grok codebase.")
    if origin.data:
        lines.append(f"Trained on {', '.join(origin.data)}.")
    elif manifest is None:
        lines.append("No data manifest came with this export.")
    if manifest is not None:
        name, content = manifest
        digest = hashlib.sha256(content).hexdigest()
        size = f"{len(content):,} bytes, SHA-256 `{digest}`"
        lines.append(f"[{name}]({name}) is the data manifest ({size}).")
    if origin.metrics:
        rows = [f"| {name} | {value:.4g} |" for name, value in origin.metrics.items()]
        lines.append("\n".join(["| measured at the end | value |", "|---|---|", *rows]))
    return "\n\n".join(lines)


def _licence(origin: Provenance, licence: str | None) -> str:
    """The section on the licence, `licence` if given, else that of the origin."""
    if licence is not None:
        return f"{licence}, as stated by who exported these weights."
    if origin.licence == "other":
        return f"That of [{origin.repository}](https://huggingface.co/{origin.repository})."
    if origin.licence is not None:
        return f"{origin.licence.capitalize()}, as the release of {origin.repository} has it."
    return "Not stated. That of the base weights holds for weights that were made from them."
