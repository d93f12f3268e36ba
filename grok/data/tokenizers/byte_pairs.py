"""Byte pairs ordered by their ids alone: tokenizer.tok.json files, as Grok-2's release has."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import tiktoken

from grok.data.tokenizers.files import TokenizerFiles, parse_object
from grok.data.tokenizers.tokenizer import check_id, check_unicode, decode
from grok.errors import DataError

# How a text is split before bytes are joined, by the file's `word_split`. V1 is Llama 3's pattern
# with each digit on its own.
WORD_SPLITS = {
    "V1": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
}
PAD, EOS, SEPARATOR = "<|pad|>", "<|eos|>", "<|separator|>"
# Larger vocabularies are taken for damage, lest a wrong id take all memory.
MAX_VOCAB_SIZE = 1 << 22
# The library keeps a place to return to for each space, of which it has a million.
MAX_SPACES = 500_000


class BytePairTokenizer:
    """A `Tokenizer` (see there) over a tokenizer.tok.json. It never puts bos in front, and ends a
    completion at <|separator|>, the end of a message, too."""

    def __init__(self, files: TokenizerFiles) -> None:
        """Loads the file; DataError where it is damaged."""
        self.files = files
        fields = parse_object(files.data, files.path)
        regular, special = (
            _tokens(fields, key, files.path) for key in ("regular_tokens", "special_tokens")
        )
        self.special_tokens: Mapping[str, int] = _special_tokens(special, files.path)
        ids = [*regular.values(), *special.values()]
        self.vocab_size = _vocab_size(fields, ids, files.path)
        self._encoding = _encoding(fields, regular, dict(self.special_tokens), files.path)
        self._bytes = [b""] * self.vocab_size
        for data, token_id in regular.items():
            self._bytes[token_id] = data
        self._names = {token_id: name for name, token_id in self.special_tokens.items()}
        self.pad_id = self.special_tokens.get(PAD, -1)
        ids_by_name = self.special_tokens
        ends = [ids_by_name[name] for name in (EOS, SEPARATOR) if name in ids_by_name]
        stated = files.eos(ids_by_name, ends)
        self.eos_ids = tuple(dict.fromkeys((*stated, *ends)))
        self.eos_id = self.eos_ids[0] if self.eos_ids else -1
        self.bos_id = files.bos(self.special_tokens, -1)
        self.adds_bos = self.bos_id >= 0 and files.adds_bos(default=False)

    def __reduce__(self) -> tuple[type, tuple[TokenizerFiles]]:
        return BytePairTokenizer, (self.files,)

    def encode(
        self, text: str, *, allow_special: bool = False, continues: bool = False
    ) -> list[int]:
        """Ids of `text`, without bos or eos; DataError when it is not valid Unicode."""
        check_unicode(text)
        _check_runs(text)
        if not allow_special:
            return self._encoding.encode_ordinary(text)
        return self._encoding.encode(text, allowed_special="all")

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, special tokens nothing."""
        return decode(self, ids)

    def piece(self, token_id: int) -> str:
        """Text of a token, the name of a special one."""
        check_id(token_id, self.vocab_size)
        return self._names.get(token_id) or self._bytes[token_id].decode(errors="replace")

    def piece_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        """UTF-8 bytes of a token; special ones, and ids that no token has, have none."""
        check_id(token_id, self.vocab_size)
        return self._bytes[token_id]


def _check_runs(text: str) -> None:
    """Raises DataError for spaces without end, at which the library would end the process."""
    if len(text) <= MAX_SPACES:
        return
    for run in re.finditer(r"[^\S\r\n]+", text):
        if len(run[0]) > MAX_SPACES:
            problem = f"the text has {len(run[0])} spaces in a row at character {run.start()}"
            raise DataError(f"{problem}, too long to be split; up to {MAX_SPACES} would work.")


def _tokens(fields: dict[str, Any], key: str, path: str) -> dict[bytes, int]:
    """Ids by bytes of one of the file's two lists."""
    entries = fields.get(key)
    if not isinstance(entries, list):
        raise DataError(f"{path}: {key} is no list of tokens; the released file would work.")
    tokens: dict[bytes, int] = {}
    for number, entry in enumerate(entries):
        try:
            values, token_id = entry["bytes"], entry["token"]
            if not isinstance(values, list) or not values or type(token_id) is not int:
                raise ValueError
            data = bytes(values)
        except (TypeError, ValueError, KeyError, OverflowError):
            right = 'an object as {"bytes": [104, 105], "token": 7} would work'
            raise DataError(f"{path}: {key}[{number}] is {entry!r:.60}; {right}.") from None
        if data in tokens:
            raise DataError(f"{path}: {key}[{number}] has the bytes of token {tokens[data]} again.")
        tokens[data] = token_id
    return tokens


def _special_tokens(special: dict[bytes, int], path: str) -> dict[str, int]:
    try:
        return {data.decode(): token_id for data, token_id in special.items()}
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: special token {error.object!r:.60} is not UTF-8.") from None


def _vocab_size(fields: dict[str, Any], ids: list[int], path: str) -> int:
    """One more than the last id, or what the file says beyond."""
    if not ids:
        raise DataError(f"{path}: has no tokens; the released file would work.")
    if min(ids) < 0 or max(ids) >= MAX_VOCAB_SIZE:
        outside = min(ids) if min(ids) < 0 else max(ids)
        problem = f"{path}: has a token of id {outside}"
        raise DataError(f"{problem}; ids from 0 to {MAX_VOCAB_SIZE - 1} would work.")
    if len(set(ids)) < len(ids):
        seen: set[int] = set()
        twice = next(i for i in ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
        raise DataError(f"{path}: two tokens have the id {twice}; the released file would work.")
    size = fields.get("vocab_size", max(ids) + 1)
    if type(size) is not int or not max(ids) < size <= MAX_VOCAB_SIZE:
        problem = f"{path}: vocab_size is {size!r:.60} and the last token's id {max(ids)}"
        raise DataError(f"{problem}; {max(ids) + 1} would work.")
    return size


def _encoding(
    fields: dict[str, Any], regular: dict[bytes, int], special: dict[str, int], path: str
) -> tiktoken.Encoding:
    split = fields.get("word_split")
    if not isinstance(split, str) or split not in WORD_SPLITS:
        known = ", ".join(WORD_SPLITS)
        raise DataError(f"{path}: word_split is {split!r:.60}; {known} would work.")
    if missing := [byte for byte in range(256) if bytes([byte]) not in regular]:
        problem = f"{path}: there is no token for byte 0x{missing[0]:02x}"
        raise DataError(f"{problem}, so that it cannot write every text; all 256 would work.")
    pattern = fields.get("pat_str") or WORD_SPLITS[split]
    try:
        return tiktoken.Encoding(
            path, pat_str=pattern, mergeable_ranks=regular, special_tokens=special
        )
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: cannot be used to split text: {error}.") from None
