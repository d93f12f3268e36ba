"""The stages of a tokenizer.json that this project has to understand: what it puts around a text,
and how single tokens are decoded. Stages that it does not know are refused by name."""

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

from grok.errors import DataError

# Hugging Face's conversions write a space as SentencePiece does, U+2581.
SPACE = "\u2581"
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """GPT-2's character of each byte: itself where it can be seen, else one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(0x100 + number): byte for number, byte in enumerate(others)
    }


class PieceDecoder:
    """Bytes of single pieces, as the file's decoder would join them. DataError, by name, where that
    depends on other pieces, or the model is not of byte pairs."""

    def __init__(self, fields: Mapping[str, Any], path: str) -> None:
        kind = _kind(fields.get("model"))
        if kind != "BPE":
            right = "one with a BPE model would work"
            raise DataError(f"{path}: its model is {kind}, which is not supported; {right}.")
        model = fields["model"]
        for key in ("continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                problem = f"{path}: its model has {key}={model[key]!r:.40}, which is not supported"
                raise DataError(f"{problem}; one without would work.")
        stages = list(_stages(fields.get("decoder"), "decoders"))
        self._alphabet: dict[str, int] = {}
        self._drops_spaces = self._strips_space = False
        match [_kind(stage) for stage in stages]:
            case ["ByteLevel"]:
                self._alphabet = byte_alphabet()
            case ["Metaspace"] if stages[0].get("replacement") == SPACE:
                self._drops_spaces = _prepends(stages[0])
            case ["Replace", "ByteFallback", "Fuse", *strip] if _is_space(stages[0]):
                self._strips_space = strip == ["Strip"] and _strips_one(stages[-1])
                if strip and not self._strips_space:
                    raise _refusal(stages, path)
            case _:
                raise _refusal(stages, path)
        self._byte_fallback = "ByteFallback" in map(_kind, stages)

    def decode(self, piece: str, first: bool) -> bytes:
        """UTF-8 bytes of a piece, which is the `first` of a text or not."""
        if self._alphabet:
            if all(letter in self._alphabet for letter in piece):
                return bytes(self._alphabet[letter] for letter in piece)
            return piece.encode()
        if self._byte_fallback and (match := BYTE_PIECE.fullmatch(piece)):
            data = bytes.fromhex(match[1])
        elif first and self._drops_spaces:
            data = piece.replace(SPACE, "").encode()
        else:
            data = piece.replace(SPACE, " ").encode()
        return data.removeprefix(b" ") if first and self._strips_space else data


def first_and_last_tokens(fields: Mapping[str, Any], path: str) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts before a text, none or bos, and behind it."""
    first: list[int] = []
    last: list[int] = []
    for stage in _stages(fields.get("post_processor"), "processors"):
        if _kind(stage) == "ByteLevel":
            continue
        if _kind(stage) != "TemplateProcessing":
            problem = f"{path}: its post-processor is {_kind(stage)}, which is not supported"
            raise DataError(f"{problem}; a TemplateProcessing would work.")
        try:
            names = [entry.get("SpecialToken", {}).get("id") for entry in stage["single"]]
            tokens = stage["special_tokens"]
            ids = [[None] if name is None else tokens[name]["ids"] for name in names]
            flat: list[Any] = [i for group in ids for i in group]
            text = flat.index(None)
            if not all(type(i) is int for i in (*flat[:text], *flat[text + 1 :])):
                raise TypeError
        except (TypeError, KeyError, AttributeError, ValueError):
            problem = f"{path}: the template of its post-processor cannot be read"
            raise DataError(f"{problem}; the released file would work.") from None
        first, last = first + flat[:text], flat[text + 1 :] + last
    if len(first) > 1 or len(last) > 1:
        problem = f"{path}: its post-processor puts tokens {first} before a text and {last} behind"
        raise DataError(f"{problem}; at most one before and one behind would work.")
    return first, last


def without_prefix(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same file without the space that it puts before a text."""
    fields = copy.deepcopy({key: fields.get(key) for key in fields if key != "model"}) | {
        "model": fields["model"]
    }
    normalizers = [
        stage
        for stage in _stages(fields.get("normalizer"), "normalizers")
        if not (_kind(stage) == "Prepend" and stage.get("prepend") == SPACE)
    ]
    fields["normalizer"] = {"type": "Sequence", "normalizers": normalizers} if normalizers else None
    for stage in _stages(fields.get("pre_tokenizer"), "pretokenizers"):
        if _kind(stage) == "Metaspace":
            stage.pop("add_prefix_space", None)
            stage["prepend_scheme"] = "never"
        elif _kind(stage) == "ByteLevel":
            stage["add_prefix_space"] = False
    return fields


def _stages(stage: Any, key: str) -> Iterator[dict[str, Any]]:
    """The stages of a sequence, those of sequences in it too."""
    if isinstance(stage, dict) and _kind(stage) == "Sequence":
        inner_stages = stage.get(key)
        for inner in inner_stages if isinstance(inner_stages, list) else ():
            yield from _stages(inner, key)
    elif isinstance(stage, dict):
        yield stage


def _kind(stage: Any) -> str:
    return str(stage.get("type")) if isinstance(stage, dict) else "none"


def _prepends(metaspace: Mapping[str, Any]) -> bool:
    if scheme := metaspace.get("prepend_scheme"):
        return scheme != "never"
    return bool(metaspace.get("add_prefix_space", True))


def _is_space(replace: Mapping[str, Any]) -> bool:
    return replace.get("pattern") == {"String": SPACE} and replace.get("content") == " "


def _strips_one(strip: Mapping[str, Any]) -> bool:
    return (strip.get("content"), strip.get("start"), strip.get("stop")) == (" ", 1, 0)


def _refusal(stages: list[dict[str, Any]], path: str) -> DataError:
    kinds = ", ".join(map(_kind, stages)) or "none"
    right = "ByteLevel, Metaspace, or Replace, ByteFallback, Fuse and Strip would work"
    return DataError(f"{path}: its decoder is {kinds}, which is not supported; {right}.")
