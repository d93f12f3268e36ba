"""README.md of an exported folder, its model card: what the weights are and what can read them."""

import hashlib
import re

from grok.weights.huggingface.adapters.grok_1 import HPCAI, KEYFAN
from grok.weights.huggingface.config_json import numbers
from grok.weights.source import Source

FILE = "README.md"
RELEASE = "xai-org/grok-1"
RELEASE_PARAMETERS = 315_684_820_992
# By the format that the weights were exported from.
ORIGINS = {
    "xai": "Not stated. They were exported from a folder in the release's format (`ckpt-0`).",
    "orbax": "Not stated. They were exported from a checkpoint of the grok codebase.",
    "huggingface": "Not stated. They were exported from another Hugging Face folder of Grok-1.",
}
CODE_FILES = ("configuration_grok1.py", "modeling_grok1.py", "modeling_grok1_outputs.py")


def model_card(
    source: Source,
    dtype: str,
    base_weights: str | None = None,
    manifest: tuple[str, bytes] | None = None,
) -> str:
    """The card of `source` exported in `dtype`, as Markdown with a YAML head.

    `base_weights` says where the weights came from, or which model they were trained from; by
    default the release, for weights in its format and of its size. `manifest` is the name and
    content of the folder's file on the training data.
    """
    if base_weights is None and _is_release(source):
        base_weights = RELEASE
    sections = (
        ("Reading it", _reading(source)),
        ("Base weights", _base(source, dtype, base_weights)),
        ("Config", _table(source)),
        ("Training data", _data(manifest)),
        ("Licence", "Apache-2.0, as the release of Grok-1 has it."),
    )
    parameters = source.config.num_parameters()
    title = f"# A Grok-1 model of {parameters:,} parameters, in {dtype}"
    body = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in sections)
    return f"{_head(base_weights)}\n\n{title}\n\n{body}\n"


def _is_release(source: Source) -> bool:
    return source.format == "xai" and source.config.num_parameters() == RELEASE_PARAMETERS


def _head(base_weights: str | None) -> str:
    lines = ["---", "license: apache-2.0", "pipeline_tag: text-generation"]
    # The hub links models by names of this form; anything else it would refuse.
    if base_weights and re.fullmatch(r"[\w.-]+/[\w.-]+", base_weights):
        lines.append(f"base_model: {base_weights}")
    return "\n".join([*lines, "tags:", "- grok-1", "- mixture-of-experts", "---"])


def _reading(source: Source) -> str:
    c = source.config
    text = (
        "A generic decoder cannot read this folder. Its tensors are named and laid out as in "
        f"[{HPCAI}](https://huggingface.co/{HPCAI}), whose model code it needs: copy "
        f"{', '.join(f'`{file}`' for file in CODE_FILES)} from there to here, read them, since "
        "they will be executed, and load the folder with `trust_remote_code=True`. The code of "
        f"[{KEYFAN}](https://huggingface.co/{KEYFAN}) expects other names. No tokenizer is here "
        "either; Grok-1's is the file `tokenizer.model` of xAI's repository."
    )
    if c.num_heads * c.head_dim != c.embed_dim or c.rope_theta != 10000:
        text += (
            "\n\nThat code takes the width of a head to be hidden_size / num_attention_heads and "
            "the base of the rotary embedding to be 10000. This model differs (see head_dim and "
            "rope_theta below), so the code must be changed accordingly."
        )
    return text


def _base(source: Source, dtype: str, base_weights: str | None) -> str:
    unknown = f"Not stated. They were exported from {source.path}."
    text = base_weights or ORIGINS.get(source.format, unknown)
    if source.dtype == "int8":
        text += (
            "\n\nThe matrices were int8 with bfloat16 scales. Here they are the products, "
            f"{'exact' if dtype == 'float32' else 'each rounded once'} in {dtype}."
        )
    elif source.dtype != dtype:
        text += f"\n\nThe matrices were {source.dtype} and were converted to {dtype}."
    return text


def _table(source: Source) -> str:
    rows = [f"| {key} | {value} |" for key, value in numbers(source.config).items()]
    active = source.config.num_active_parameters()
    rows.append(f"| parameters that a token uses | {active:,} |")
    return "\n".join(["| key | value |", "|---|---|", *rows])


def _data(manifest: tuple[str, bytes] | None) -> str:
    if manifest is None:
        return "No data manifest came with this export."
    name, content = manifest
    digest = hashlib.sha256(content).hexdigest()
    return f"[{name}]({name}) is the data manifest ({len(content):,} bytes, SHA-256 `{digest}`)."
