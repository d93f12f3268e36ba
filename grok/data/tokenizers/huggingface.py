"""Hugging Face's tokenizer.json: byte pairs over bytes (Llama 3's), or over characters with byte
fallback, as conversions of SentencePiece models have it. Text is encoded by the `tokenizers`
library; decoding, which has to be by single tokens, is by the bytes of each."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers

from grok.data.tokenizers.files import SETTINGS_FILE, TokenizerFiles, parse_object
from grok.data.tokenizers.pipeline import PieceDecoder, first_and_last_tokens, without_prefix
from grok.data.tokenizers.tokenizer import check_id, check_unicode, decode
from grok.errors import DataError

# Larger vocabularies are taken for damage, lest a wrong id take all memory.
MAX_VOCAB_SIZE = 1 << 22


class HuggingFaceTokenizer:
    """A `Tokenizer` (see there) over a tokenizer.json."""

    def __init__(self, files: TokenizerFiles) -> None:
        """Loads the file; DataError where it is damaged or its tokens cannot be decoded singly."""
        self.files = files
        self._fields = fields = parse_object(files.data, files.path)
        pieces = PieceDecoder(fields, files.path)
        added = _added_tokens(fields, files)
        self.special_tokens: Mapping[str, int] = {
            token["content"]: token["id"] for token in added.values() if token["special"]
        }
        first, last = first_and_last_tokens(fields, files.path)
        self.bos_id = first[0] if first else files.bos(self.special_tokens, -1)
        self.eos_ids = files.eos(self.special_tokens, last)
        self.eos_id = self.eos_ids[0] if self.eos_ids else -1
        self.adds_bos = files.adds_bos(default=bool(first))
        if self.adds_bos and self.bos_id < 0:
            problem = f"{SETTINGS_FILE} has add_bos_token and names no bos_token of the tokenizer"
            raise DataError(f"{files.path}: {problem}; one of its special tokens would work.")
        self.pad_id = self.special_tokens.get(files.token_setting("pad_token") or "", -1)
        self._encoders: dict[tuple[bool, bool], tokenizers.Tokenizer] = {}
        ids = self._encoder(False, False).get_vocab(with_added_tokens=True)
        self.vocab_size = _vocab_size(ids.values(), files.path)
        _check_added(added, ids, files.path)
        self._pieces = [""] * self.vocab_size
        for piece, token_id in ids.items():
            self._pieces[token_id] = piece
        self._bytes, self._first_bytes = (
            [pieces.decode(piece, first) for piece in self._pieces] for first in (False, True)
        )
        for token_id, token in added.items():
            data = b"" if token["special"] else token["content"].encode()
            self._bytes[token_id] = self._first_bytes[token_id] = data

    def __reduce__(self) -> tuple[type, tuple[TokenizerFiles]]:
        return HuggingFaceTokenizer, (self.files,)

    def encode(
        self, text: str, *, allow_special: bool = False, continues: bool = False
    ) -> list[int]:
        """Ids of `text`, without bos or eos; DataError when it is not valid Unicode."""
        check_unicode(text)
        encoder = self._encoder(allow_special, continues)
        # Of the library's ways to encode, the one that does not count characters.
        (encoding,) = encoder.encode_batch_fast([text], add_special_tokens=False)
        return encoding.ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, special tokens nothing."""
        return decode(self, ids)

    def piece(self, token_id: int) -> str:
        """Name of a token in the file."""
        check_id(token_id, self.vocab_size)
        return self._pieces[token_id]

    def piece_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        """UTF-8 bytes of a token, at the start of a text where `first`; special ones, and ids that
        no token has, have none."""
        check_id(token_id, self.vocab_size)
        return (self._first_bytes if first else self._bytes)[token_id]

    def _encoder(self, allow_special: bool, continues: bool) -> tokenizers.Tokenizer:
        """The library's tokenizer, one for each way to read a text: it has no such arguments, and
        changing its settings for one call would change them for other threads."""
        if (key := (allow_special, continues)) not in self._encoders:
            fields = without_prefix(self._fields) if continues else self._fields
            encoder = _from_fields(fields, self.special_tokens, self.files.path)
            encoder.encode_special_tokens = not allow_special
            self._encoders[key] = encoder
        return self._encoders[key]


def _added_tokens(fields: Mapping[str, Any], files: TokenizerFiles) -> dict[int, dict[str, Any]]:
    """The tokens beside the model's by id: content, and whether they are special, as those always
    are that tokenizer_config.json says so of, or names as bos, eos or padding."""
    named = {files.token_setting(key) for key in ("bos_token", "eos_token", "pad_token")}
    decoder = files.added_tokens()
    special = {i for i, entry in decoder.items() if entry.get("special")}
    tokens: dict[int, dict[str, Any]] = {}
    for token in _added(fields, files.path):
        try:
            content, token_id = token["content"], token["id"]
            if not isinstance(content, str) or type(token_id) is not int or token_id < 0:
                raise TypeError
        except (TypeError, KeyError):
            problem = f"{files.path}: added_tokens has {token!r:.60}"
            raise DataError(f"{problem}; an object with content and id would work.") from None
        is_special = bool(token.get("special")) or content in named or str(token_id) in special
        tokens[token_id] = {"content": content, "id": token_id, "special": is_special}
    return tokens


def _added(fields: Mapping[str, Any], path: str) -> list[Any]:
    tokens = fields.get("added_tokens") or []
    if not isinstance(tokens, list):
        raise DataError(f"{path}: added_tokens is no list of tokens; the released file would work.")
    return tokens


def _from_fields(
    fields: Mapping[str, Any], special: Mapping[str, int], path: str
) -> tokenizers.Tokenizer:
    added = [{**token, "special": token["content"] in special} for token in _added(fields, path)]
    # Whole texts are encoded, whatever the file was made for.
    changes = {"added_tokens": added, "truncation": None, "padding": None}
    try:
        return tokenizers.Tokenizer.from_str(json.dumps({**fields, **changes}))
    except Exception as error:  # the library raises nothing more specific
        raise DataError(f"{path} is no tokenizer.json: {error!s:.200}.") from None


def _check_added(added: Mapping[int, Mapping[str, Any]], ids: Mapping[str, int], path: str) -> None:
    """Raises DataError for an id that the library does not use: it counts on from the vocabulary
    where the file's own ids leave one out or use one twice."""
    for token_id, token in added.items():
        if ids.get(token["content"]) != token_id:
            problem = f"{path}: added token {token['content']!r:.60} has the id {token_id}"
            right = f"{ids.get(token['content'])} would work"
            raise DataError(f"{problem}, which does not follow from the others; {right}.")


def _vocab_size(ids: Iterable[int], path: str) -> int:
    size = max(ids, default=-1) + 1
    if not 0 < size <= MAX_VOCAB_SIZE:
        problem = f"{path}: its last token has the id {size - 1}"
        raise DataError(f"{problem}; ids from 0 to {MAX_VOCAB_SIZE - 1} would work.")
    return size
