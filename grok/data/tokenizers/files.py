"""The files that a tokenizer consists of: its own, and the settings beside it in a release."""

import codecs
import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from grok import hub, storage
from grok.errors import DataError

# Names in a release's folder, the first that is there before the others.
TOK_JSON, TOKENIZER_JSON, SENTENCEPIECE = "tokenizer.tok.json", "tokenizer.json", "tokenizer.model"
TOKENIZER_NAMES = (TOK_JSON, TOKENIZER_JSON, SENTENCEPIECE)
SETTINGS_FILE, GENERATION_FILE = "tokenizer_config.json", "generation_config.json"
MODEL_CONFIG = "config.json"
# The chat template, where it is not in tokenizer_config.json: the first that is there.
TEMPLATE_FILE, TEMPLATE_JSON = "chat_template.jinja", "chat_template.json"
# Models whose tokenizer.model, in Hugging Face's libraries, puts bos first unless told otherwise.
BOS_MODEL_TYPES = ("llama", "mistral", "mixtral")


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer's file under its canonical `name`, as bytes, and what the files beside it say:
    `settings` is tokenizer_config.json's object, `generation` the ids of bos and eos for the model,
    `template` the text of a chat template's file. `path` is what messages call it."""

    name: str
    data: bytes
    path: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    template: str = ""

    @property
    def sha256(self) -> str:
        """Hash of the tokenizer's own file, which tells it from others."""
        return hashlib.sha256(self.data).hexdigest()

    def contents(self) -> dict[str, bytes]:
        """Every file by name: written to a folder, they load as the same tokenizer."""
        objects = {SETTINGS_FILE: self.settings, GENERATION_FILE: self.generation}
        beside = {name: _to_json(fields) for name, fields in objects.items() if fields}
        if self.template:
            beside[TEMPLATE_FILE] = self.template.encode()
        return {self.name: self.data, **beside}

    def chat_template(self) -> str:
        """The Jinja text of the chat template; empty where there is none."""
        return self.template or template_in(self.settings, f"{self.path}: {SETTINGS_FILE}")

    def token_setting(self, key: str) -> str | None:
        """The text of a token that tokenizer_config.json names, such as its eos_token."""
        value = self.settings.get(key)
        if isinstance(value, dict):
            value = value.get("content")
        if value is not None and not isinstance(value, str):
            problem = f"{self.path}: {key} in {SETTINGS_FILE} is no text but {value!r:.60}"
            raise DataError(f"{problem}; the text of a token would work.")
        return value

    def added_tokens(self) -> dict[str, dict[str, Any]]:
        """The tokens that tokenizer_config.json adds, by id as text."""
        tokens = self.settings.get("added_tokens_decoder") or {}
        if not isinstance(tokens, dict) or not all(isinstance(t, dict) for t in tokens.values()):
            problem = f"{self.path}: added_tokens_decoder in {SETTINGS_FILE} is not of objects"
            raise DataError(f"{problem}; the released file would work.")
        return tokens

    def adds_bos(self, default: bool) -> bool:
        """True where a text gets bos in front: as tokenizer_config.json says, or `default`."""
        value = self.settings.get("add_bos_token")
        if value is not None and not isinstance(value, bool):
            right = "true or false would work"
            raise DataError(f"{self.path}: {SETTINGS_FILE} has add_bos_token={value!r}; {right}.")
        if value is None and str(self.settings.get("tokenizer_class")).startswith("LlamaTokenizer"):
            return True
        return default if value is None else value

    def bos(self, special: Mapping[str, int], default: int) -> int:
        """Id of bos: tokenizer_config.json's, else `default`, else the model's; -1 for none."""
        named = special.get(self.token_setting("bos_token") or "", default)
        stated = _ids(self.generation, "bos_token_id", self.path)
        return next((i for i in (named, *stated) if i in {default, *special.values()} - {-1}), -1)

    def eos(self, special: Mapping[str, int], default: Collection[int]) -> tuple[int, ...]:
        """Ids that end a text, the one that ends documents first: the model's, then the one that
        tokenizer_config.json names; without either, `default`. An id that is not of a special token
        is not among them: configs that were never adapted to their tokenizer have such."""
        stated = _ids(self.generation, "eos_token_id", self.path)
        ids = [i for i in stated if i in {*special.values(), *default}]
        if (named := special.get(self.token_setting("eos_token") or "")) is not None:
            ids.append(named)
        return tuple(dict.fromkeys(ids or default))


def read_tokenizer_files(path: str | os.PathLike[str]) -> TokenizerFiles:
    """Reads a tokenizer's file, or the one in a release's folder, and the settings beside it, local
    or at gs://. DataError where it is missing or of no known kind."""
    path = tokenizer_file(path)
    data = storage.read_bytes(path, DataError)
    folder = os.path.dirname(path) or "."
    beside = (SETTINGS_FILE, GENERATION_FILE, MODEL_CONFIG)
    settings, generation, model = (_read_object(storage.join(folder, name)) for name in beside)
    kind = _kind(data, path)
    if kind == SENTENCEPIECE and not settings and model.get("model_type") in BOS_MODEL_TYPES:
        settings = {"add_bos_token": True}
    generation = _merged(generation, model, path)
    return TokenizerFiles(kind, data, path, settings, generation, _read_template(folder))


def find_tokenizer_file(folders: Iterable[str | os.PathLike[str]]) -> str | None:
    """The path of the tokenizer in the first of these folders that has one, if any does."""
    files = (storage.join(folder, name) for folder in folders for name in TOKENIZER_NAMES)
    return next((file for file in files if storage.exists(file, DataError)), None)


def folders_beside(weights: str) -> list[str]:
    """The folders that may hold the tokenizer of weights: their own, and, as they may be a run's
    `checkpoints` or a step of these, the two around it."""
    if hub.is_hub(weights):
        return [weights]
    run = os.path.dirname(weights.rstrip("/"))
    return [weights, run, os.path.dirname(run)]


def tokenizer_file(path: str | os.PathLike[str]) -> str:
    """A file's path, or that of the tokenizer in a folder; DataError where it has none."""
    if not _is_folder(os.fspath(path)):
        return os.fspath(path)
    if file := find_tokenizer_file([path]):
        return file
    *others, last = TOKENIZER_NAMES
    names = f"{', '.join(others)} or {last}"
    problem = f"{os.fspath(path)}: cannot be read: it is a folder without {names}"
    raise DataError(f"{problem}; a tokenizer's file, or a folder with one, would work.")


def template_in(fields: Mapping[str, Any], name: str) -> str:
    """The chat template of a JSON object, the default one of several; empty where it has none."""
    template = fields.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise DataError(f"{name} has a chat_template that is no text; Jinja text would work.")
    return template or ""


def read_template(path: str) -> str:
    """The chat template in a file: Jinja text, or a .json that has one. DataError where the file is
    missing or has none."""
    data = storage.read_bytes(path, DataError)
    if path.endswith(".json"):
        if template := template_in(parse_object(data, path), path):
            return template
        raise DataError(f"{path} has no chat_template; a file with Jinja text would work.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"{path} is not UTF-8 at byte offset {error.start}"
        raise DataError(f"{problem}; a file with Jinja text would work.") from None


def _read_template(folder: str) -> str:
    files = [storage.join(folder, name) for name in (TEMPLATE_FILE, TEMPLATE_JSON)]
    file = next((file for file in files if storage.exists(file, DataError)), None)
    return read_template(file) if file else ""


def parse_object(data: bytes, path: str) -> dict[str, Any]:
    """The JSON object in a file's bytes; DataError where there is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not JSON: {error!s:.200}; the released file would work."
        ) from None
    if not isinstance(value, dict):
        raise DataError(f"{path} is no JSON object; the released file would work.")
    return value


def _is_folder(path: str) -> bool:
    if not storage.is_remote(path):
        return Path(path).is_dir()
    # At gs:// a folder is a prefix; a tokenizer's file has a suffix.
    return not path.endswith((".json", ".model"))


def _kind(data: bytes, path: str) -> str:
    """The canonical name of a file with these bytes."""
    if data.removeprefix(codecs.BOM_UTF8).lstrip()[:1] != b"{":
        return SENTENCEPIECE
    try:
        fields = parse_object(data, path)
    except DataError as error:
        reason = str(error).removeprefix(f"{path} is ")
        raise DataError(f"{path} is not a SentencePiece model, and {reason}") from None
    if "regular_tokens" in fields:
        return TOK_JSON
    if "model" in fields:
        return TOKENIZER_JSON
    wanted = "neither `model`, as a tokenizer.json, nor `regular_tokens`, as a tokenizer.tok.json"
    raise DataError(f"{path} has {wanted}; the tokenizer's own file would work.")


def _read_object(path: str) -> dict[str, Any]:
    if not storage.exists(path, DataError):
        return {}
    return parse_object(storage.read_bytes(path, DataError), path)


def _merged(generation: Mapping[str, Any], model: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The ids of bos and eos in generation_config.json, then those in config.json."""
    merged: dict[str, Any] = {}
    for key in ("bos_token_id", "eos_token_id"):
        ids = dict.fromkeys([*_ids(generation, key, path), *_ids(model, key, path)])
        if ids:
            merged[key] = list(ids) if len(ids) > 1 and key == "eos_token_id" else next(iter(ids))
    return merged


def _ids(fields: Mapping[str, Any], key: str, path: str) -> list[int]:
    value = fields.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in ids):
        raise DataError(f"{path}: the config beside it has {key}={value!r}; an id would work.")
    return ids


def _to_json(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()
