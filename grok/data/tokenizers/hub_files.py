"""The files of a tokenizer as programs of the Hugging Face hub read them: its own, and those that
say what a model of it begins and ends with."""

import json
from collections.abc import Sequence
from typing import Any

from grok.data.tokenizers.files import (
    GENERATION_FILE,
    SENTENCEPIECE,
    SETTINGS_FILE,
    TEMPLATE_FILE,
    TOKENIZER_JSON,
)
from grok.data.tokenizers.sentencepiece_proto import UNKNOWN, parse_model
from grok.data.tokenizers.tokenizer import Tokenizer, config_ids

# Classes of transformers that read a file of this name.
CLASSES = {SENTENCEPIECE: "LlamaTokenizer", TOKENIZER_JSON: "PreTrainedTokenizerFast"}


def hub_files(
    tokenizer: Tokenizer, context_length: int, template: str = "", answer_ends: Sequence[int] = ()
) -> dict[str, bytes]:
    """Every file by name. What is beside the tokenizer stays as it is; a tokenizer_config.json and
    a chat template are added where there is none, and generation_config.json has the ids at which
    an answer of the `template` ends beside those of a text."""
    files = tokenizer.files.contents()
    if not tokenizer.files.settings and tokenizer.files.name in CLASSES:
        files[SETTINGS_FILE] = _json(_settings(tokenizer, context_length))
    if template and not tokenizer.files.chat_template():
        files[TEMPLATE_FILE] = template.encode()
    ids = config_ids(tokenizer)
    ends = list(dict.fromkeys((*tokenizer.eos_ids, *answer_ends)))
    if ends:
        ids["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if ids:
        files[GENERATION_FILE] = _json(ids)
    return files


def _settings(tokenizer: Tokenizer, context_length: int) -> dict[str, Any]:
    """The fields of a tokenizer_config.json for a tokenizer that came without one."""
    files = tokenizer.files
    fields: dict[str, Any] = {
        "tokenizer_class": CLASSES[files.name],
        "model_max_length": context_length,
        "add_bos_token": tokenizer.adds_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    fields |= {f"{word}_token": tokenizer.piece(i) for word, i in ids.items() if i >= 0}
    if files.name == SENTENCEPIECE:
        model = parse_model(files.data)
        fields |= {"legacy": False, "add_prefix_space": model.adds_space}
        fields["unk_token"] = next(text for text, _, kind in model.pieces if kind == UNKNOWN)
    return fields


def _json(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()
