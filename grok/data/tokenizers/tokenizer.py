"""The interface of every tokenizer, and decoding over it that never splits a character."""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from grok import storage
from grok.data.tokenizers.files import TokenizerFiles
from grok.errors import DataError


class Tokenizer(Protocol):
    """Text to token ids and back, made by `load_tokenizer`; picklable, so that worker processes get
    a copy. `vocab_size` is more than any id, `eos_ids` end a completion, the first of them,
    `eos_id`, a document; ids of padding and of the begin of a text are -1 where there is none."""

    vocab_size: int  # every id is below it
    pad_id: int  # ids of padding, and of the begin and end of a text; -1 where there is none
    bos_id: int
    eos_id: int  # the first of eos_ids: it ends documents
    eos_ids: tuple[int, ...]  # each of them ends a completion
    adds_bos: bool  # True where a model of this tokenizer expects bos before every text
    special_tokens: Mapping[str, int]  # ids by text
    files: TokenizerFiles  # what it was loaded from

    def encode(
        self, text: str, *, allow_special: bool = False, continues: bool = False
    ) -> list[int]:
        """Ids of `text`, without bos or eos; DataError when it is not valid Unicode. The text of a
        special token is read as that token where `allow_special`, else as any other text: whoever
        wrote an untrusted text must not be able to end it. A text that `continues` another one is
        not given the space that some tokenizers put in front."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, special tokens nothing."""

    def piece(self, token_id: int) -> str:
        """Name of a token in the vocabulary, such as `</s>`."""

    def piece_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        """UTF-8 bytes of a token, at the start of a text where `first`; special tokens have none. A
        character may span several tokens, so the bytes of one need not be valid UTF-8."""
        ...


def start_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids before every text: bos, where the tokenizer adds it."""
    return [tokenizer.bos_id] if tokenizer.adds_bos else []


def config_ids(tokenizer: Tokenizer) -> dict[str, int | list[int] | None]:
    """The ids that config.json has of a tokenizer, those that there are, as programs that generate
    text read them."""
    names = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    ids: dict[str, int | list[int] | None] = {n: i for n, i in names.items() if i >= 0}
    if tokenizer.eos_ids:
        several = len(tokenizer.eos_ids) > 1
        ids["eos_token_id"] = list(tokenizer.eos_ids) if several else tokenizer.eos_id
    return ids


def encode_prompt(tokenizer: Tokenizer, text: str, *, allow_special: bool = False) -> list[int]:
    """Ids of a text that a model continues, with bos in front where the tokenizer adds it and the
    text, such as a rendered chat, does not begin with it."""
    ids = tokenizer.encode(text, allow_special=allow_special)
    start = start_ids(tokenizer)
    return ids if ids[:1] == start else start + ids


def check_unicode(text: str) -> None:
    """Raises DataError for a text that is not valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        problem = f"the text has half of a surrogate pair at character {error.start}"
        right = "which UTF-8 cannot hold; the character that was meant would work"
        raise DataError(f"{problem}, {right}.") from None


def check_id(token_id: int, vocab_size: int) -> None:
    """Raises DataError for an id that is not below `vocab_size`."""
    if not 0 <= token_id < vocab_size:
        pieces = f"the tokenizer's {vocab_size} pieces; 0 to {vocab_size - 1}"
        raise DataError(f"token id {token_id} is not among {pieces} would work.")


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """`Tokenizer.decode` by the bytes of each piece."""
    decoder = StreamDecoder(tokenizer)
    return "".join([decoder.push(i) for i in ids]) + decoder.flush()


def token_bytes(tokenizer: Tokenizer, *, first: bool = False) -> np.ndarray:
    """Number of UTF-8 bytes of each token inside a text, or as its first, int32 (V,); 0 for special
    tokens."""
    ids = range(tokenizer.vocab_size)
    return np.array([len(tokenizer.piece_bytes(i, first=first)) for i in ids], np.int32)


class StreamDecoder:
    """Decodes ids one at a time: the results of `push` and `flush`, joined, are `decode(ids)`.
    `after` holds the ids that precede, such as a prompt's. Their text is not returned; with them
    the first token keeps its leading space, and a character begun in the prompt is completed."""

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._first = True
        for token_id in after:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """Text that `token_id` completes: perhaps none, never part of a character."""
        data = self._tokenizer.piece_bytes(token_id, first=self._first)
        if self._first and not self._tokenizer.piece_bytes(token_id):
            return ""
        self._first = False
        return self._utf8.decode(data)

    @property
    def pending(self) -> bytes:
        """Bytes of a character that the ids so far have only begun."""
        return self._utf8.getstate()[0]

    def flush(self) -> str:
        """U+FFFD for an unfinished character at the end, otherwise an empty string."""
        return self._utf8.decode(b"", final=True)


def read_text(path: str | Path) -> str:
    """Text of a UTF-8 file, without a byte-order mark, line ends as they are. DataError when the
    file is missing or empty, or naming its first byte that is not UTF-8."""
    data = storage.read_bytes(path, DataError)
    try:
        if text := data.decode("utf-8-sig"):
            return text
        raise DataError(f"text file {path} is empty; one with text would work.")
    except UnicodeDecodeError as error:
        offset = f"byte offset {error.start} (0x{data[error.start]:02x})"
        problem = f"text file {path} is not UTF-8 at {offset}"
        raise DataError(f"{problem}; the file re-encoded as UTF-8 would work.") from None
