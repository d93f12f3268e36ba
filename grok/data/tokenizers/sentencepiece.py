"""Text to token ids and back, with a SentencePiece model.

Works with the release's tokenizer file and with the small ones that `train_tokenizer` makes. The
latter lose nothing: `decode(encode(text)) == text` for every text that is valid Unicode.
"""

import codecs
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from grok.data.text_stream import read_bytes, read_text
from grok.errors import DataError

# SentencePiece writes a space as this character (U+2581), inside its pieces.
SPACE = "\u2581"
# Runs of newlines that are one piece in our own tokenizers, as they are in the release's.
NEWLINE_RUNS = ["\n" * length for length in (1, 2, 3, 4)]


class Tokenizer:
    """A loaded SentencePiece model; make one with `Tokenizer.load`."""

    def __init__(self, model: bytes) -> None:
        """Take the bytes of a model file; RuntimeError when they are not one."""
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        # A model with the "dummy prefix" writes a space before every text and drops it again.
        self._adds_space = self._pieces.encode("a", out_type=str)[0].startswith(SPACE)
        bytes_of_space = [self._pieces.piece_to_id(f"<0x{b:02X}>") for b in SPACE.encode()]
        self._space_char_ids = (
            bytes_of_space if all(self._pieces.is_byte(i) for i in bytes_of_space) else None
        )

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a SentencePiece model file; DataError when it is missing or something else."""
        model = read_bytes(path, "tokenizer file")
        if model:
            try:
                return cls(model)
            except RuntimeError:
                pass
        raise DataError(
            f"{path} is not a SentencePiece model; a file that `grok.data.tokenizers.sentencepiece."
            f"train_tokenizer` wrote, or the release's tokenizer.model, would work."
        )

    @property
    def vocab_size(self) -> int:
        """Number of pieces; every id is below it."""
        return self._pieces.vocab_size()

    @property
    def pad_id(self) -> int:
        """Id of the padding piece, or -1 where the model has none."""
        return self._pieces.pad_id()

    @property
    def bos_id(self) -> int:
        """Id of the begin-of-sequence piece, or -1 where the model has none."""
        return self._pieces.bos_id()

    @property
    def eos_id(self) -> int:
        """Id of the end-of-sequence piece, or -1 where the model has none."""
        return self._pieces.eos_id()

    @property
    def unk_id(self) -> int:
        """Id of the piece for what has no other."""
        return self._pieces.unk_id()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos or eos; DataError when it is not valid Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"the text has half of a surrogate pair at character {error.start}, which UTF-8 "
                f"cannot hold; the character that was meant would work."
            ) from None
        if SPACE not in text or self._adds_space or self._space_char_ids is None:
            return self._pieces.encode(text)
        # A literal U+2581 would come back as a space, so it goes in as its three bytes.
        first, *rest = self._pieces.encode(text.split(SPACE))
        return first + [i for part in rest for i in (*self._space_char_ids, *part)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, control pieces nothing."""
        decoder = StreamDecoder(self)
        return "".join([decoder.push(i) for i in ids]) + decoder.flush()

    def piece(self, token_id: int) -> str:
        """The name that one id has in the model, such as `</s>` of a control piece."""
        return self._pieces.id_to_piece(token_id)

    def piece_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        """UTF-8 bytes that one id stands for; `first`: as the first of a text.

        A character may be spread over several ids, so the bytes of one need not be whole UTF-8.
        """
        if not 0 <= token_id < self.vocab_size:
            raise DataError(
                f"token id {token_id} is not among the tokenizer's {self.vocab_size} pieces; "
                f"0 to {self.vocab_size - 1} would work."
            )
        if self._pieces.is_control(token_id):
            return b""
        if self._pieces.is_unknown(token_id):
            return self._pieces.decode([token_id]).encode()
        piece = self._pieces.id_to_piece(token_id)
        if self._pieces.is_byte(token_id):
            return bytes([int(piece[1:-1], base=16)])
        if first and self._adds_space:
            piece = piece.removeprefix(SPACE)
        return piece.replace(SPACE, " ").encode()


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """How many UTF-8 bytes each id stands for inside a text, int32 (V,); control pieces none."""
    ids = range(tokenizer.vocab_size)
    return np.array([len(tokenizer.piece_bytes(token_id)) for token_id in ids], np.int32)


class StreamDecoder:
    """Decodes ids one at a time: what `push` and `flush` return, joined, is `decode(ids)`.

    `after` holds the ids that come before, as those of a prompt. They are not returned; with them
    the first piece keeps its leading space, and a character begun in the prompt is completed.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = ()) -> None:
        """Start behind the ids of `after`."""
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._first = True
        for token_id in after:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes: perhaps none, never part of a character."""
        data = self._tokenizer.piece_bytes(token_id, first=self._first)
        if self._first and not self._tokenizer.piece_bytes(token_id):
            return ""
        self._first = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What an unfinished character at the end reads as: U+FFFD, or nothing."""
        return self._utf8.decode(b"", final=True)


def train_tokenizer(
    files: Sequence[str | Path],
    out_path: str | Path,
    vocab_size: int,
    special: Sequence[str] = (),
) -> Tokenizer:
    """Train a BPE tokenizer of exactly `vocab_size` pieces on text files, and write its model, in a
    folder that is made where there is none.

    Ids 0 to 3 are padding, begin, end and unknown; then come runs of newlines, `special` texts that
    are one piece each, the 256 bytes (for characters too rare for a piece), and merges. Digits are
    pieces of their own and text is not normalised, so nothing is lost. The same files give the same
    bytes. DataError when a file cannot be read or its text has too few distinct words, or too many
    characters, for `vocab_size`.
    """
    texts = [read_text(path) for path in files]
    if not texts:
        raise DataError("no text files were given to train a tokenizer on; one would work.")
    Path(out_path).parent.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            user_defined_symbols=[*NEWLINE_RUNS, *special],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            # Longer lines would be left out of training without a word.
            max_sentence_length=max(len(text.encode()) for text in texts) + 1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _refusal(str(error), files, vocab_size) from None
    Path(out_path).write_bytes(model.getvalue())
    return Tokenizer(model.getvalue())


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from text.split("\n")


def _refusal(message: str, files: Sequence[str | Path], vocab_size: int) -> DataError:
    """SentencePiece's refusal of a vocabulary size, as a sentence with a size that would work."""
    names = ", ".join(str(path) for path in files)
    if found := re.search(r"Please set it to a value <= (\d+)", message):
        return DataError(
            f"the text of {names} is too short for a vocabulary of {vocab_size} pieces; "
            f"{found[1]} would work."
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return DataError(
            f"a vocabulary of {vocab_size} pieces cannot hold the 256 bytes and the characters of "
            f"{names}; {int(found[1]) + 1} would work."
        )
    return DataError(f"SentencePiece cannot train a tokenizer on {names}: {message}")
