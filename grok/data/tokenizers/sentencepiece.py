"""SentencePiece models: the release's, and those of `train_tokenizer`, which lose nothing:
`decode(encode(text)) == text` for every text that is valid Unicode."""

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from grok.data.tokenizers.tokenizer import StreamDecoder, read_text
from grok.errors import DataError

# SentencePiece writes a space as this character (U+2581), inside its pieces.
SPACE = "\u2581"
# Runs of newlines that are one piece in our own tokenizers, as they are in the release's.
NEWLINE_RUNS = ["\n" * length for length in (1, 2, 3, 4)]


class SentencePieceTokenizer:
    """A `Tokenizer` (see there) over a SentencePiece model."""

    def __init__(self, model: bytes) -> None:
        """Takes the bytes of a model file; RuntimeError when they are not one."""
        if not model:
            raise RuntimeError("an empty file")
        self._model = model
        self._processor = processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = processor.vocab_size()
        self.pad_id, self.bos_id = processor.pad_id(), processor.bos_id()
        self.eos_id, self.unk_id = processor.eos_id(), processor.unk_id()
        # A model with the "dummy prefix" writes a space before every text and drops it again.
        self._adds_space = processor.encode("a", out_type=str)[0].startswith(SPACE)
        byte_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._space_char_ids = byte_ids if all(map(processor.is_byte, byte_ids)) else None

    def __reduce__(self) -> tuple[type, tuple[bytes]]:
        return SentencePieceTokenizer, (self._model,)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos or eos; DataError when it is not valid Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            problem = f"the text has half of a surrogate pair at character {error.start}"
            right = "which UTF-8 cannot hold; the character that was meant would work"
            raise DataError(f"{problem}, {right}.") from None
        if SPACE not in text or self._adds_space or self._space_char_ids is None:
            return self._processor.encode(text)
        # A literal U+2581 would come back as a space, so it goes in as its three bytes.
        first, *rest = self._processor.encode(text.split(SPACE))
        return first + [i for ids in rest for i in (*self._space_char_ids, *ids)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, control pieces nothing."""
        decoder = StreamDecoder(self)
        return "".join([decoder.push(i) for i in ids]) + decoder.flush()

    def piece(self, token_id: int) -> str:
        """Name of a piece in the model, such as `</s>`."""
        return self._processor.id_to_piece(token_id)

    def piece_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        """UTF-8 bytes of a piece, at the start of a text where `first`; control ones have none."""
        if not 0 <= token_id < self.vocab_size:
            pieces = f"the tokenizer's {self.vocab_size} pieces; 0 to {self.vocab_size - 1}"
            raise DataError(f"token id {token_id} is not among {pieces} would work.")
        if self._processor.is_control(token_id):
            return b""
        if self._processor.is_unknown(token_id):
            return self._processor.decode([token_id]).encode()
        piece = self._processor.id_to_piece(token_id)
        if self._processor.is_byte(token_id):
            return bytes([int(piece[1:-1], base=16)])
        if first and self._adds_space:
            piece = piece.removeprefix(SPACE)
        return piece.replace(SPACE, " ").encode()


def train_tokenizer(
    files: Sequence[str | Path], out_path: str | Path, vocab_size: int, special: Sequence[str] = ()
) -> SentencePieceTokenizer:
    """Trains a BPE tokenizer of exactly `vocab_size` pieces on text files and writes its model. Ids
    0 to 3 are padding, begin, end and unknown; then come runs of newlines, the `special` texts (a
    piece each), the 256 bytes (for characters too rare for a piece), and merges. Each digit is a
    piece and text is not normalised, so nothing is lost. The same files give the same bytes.
    DataError when a file cannot be read or its text does not suit `vocab_size`."""
    if not (texts := [read_text(path) for path in files]):
        raise DataError("no text files were given to train a tokenizer on; one would work.")
    Path(out_path).parent.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.split("\n")),
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
    return SentencePieceTokenizer(model.getvalue())


def _refusal(message: str, files: Sequence[str | Path], vocab_size: int) -> DataError:
    """SentencePiece's refusal of a vocabulary size, as a sentence with a size that would work."""
    names = ", ".join(str(path) for path in files)
    vocabulary = f"a vocabulary of {vocab_size} pieces"
    problem = f"SentencePiece cannot train a tokenizer on {names}: {message}"
    if match := re.search(r"Please set it to a value <= (\d+)", message):
        problem = f"the text of {names} is too short for {vocabulary}; {match[1]} would work."
    elif match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        characters = f"the 256 bytes and the characters of {names}"
        problem = f"{vocabulary} cannot hold {characters}; {int(match[1]) + 1} would work."
    return DataError(problem)
