"""SentencePiece models: the release's, and those of `train_tokenizer`, which lose nothing:
`decode(encode(text)) == text` for every text that is valid Unicode."""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import sentencepiece

from grok.data.tokenizers.files import SENTENCEPIECE, SETTINGS_FILE, TokenizerFiles
from grok.data.tokenizers.tokenizer import check_id, check_unicode, decode, read_text
from grok.errors import DataError

# SentencePiece writes a space as this character (U+2581), inside its pieces.
SPACE = "\u2581"
# A private-use character that no model has a piece for, so that none joins it with what follows.
GUARD = "\U0010fffd"
# Runs of newlines that are one piece in our own tokenizers, as they are in the release's.
NEWLINE_RUNS = ["\n" * length for length in (1, 2, 3, 4)]
NAMED_FILES = 3  # of those in a message


class SentencePieceTokenizer:
    """A `Tokenizer` (see there) over a SentencePiece model."""

    def __init__(self, files: TokenizerFiles) -> None:
        """Loads a tokenizer.model; DataError where it is not one."""
        self.files = files
        self._processor = processor = _load(files)
        self.vocab_size: int = processor.vocab_size()
        self.special_tokens: Mapping[str, int] = {
            processor.id_to_piece(i): i for i in range(self.vocab_size) if processor.is_control(i)
        }
        _check_settings(files, self.special_tokens, self.vocab_size)
        self.pad_id, self.unk_id = processor.pad_id(), processor.unk_id()
        self.bos_id = files.bos(self.special_tokens, processor.bos_id())
        own_eos = () if processor.eos_id() < 0 else (processor.eos_id(),)
        self.eos_ids = files.eos(self.special_tokens, own_eos)
        self.eos_id = self.eos_ids[0] if self.eos_ids else -1
        self.adds_bos = self.bos_id >= 0 and files.adds_bos(default=False)
        # A model with the "dummy prefix" writes a space before every text and drops it again.
        self._adds_space = processor.encode("a", out_type=str)[0].startswith(SPACE)
        # "Legacy" tokenizers write it after each special token as well.
        self._adds_space_again = bool(files.settings.get("legacy"))
        self._num_guard_ids = len(processor.encode(GUARD))
        byte_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._space_char_ids = byte_ids if all(map(processor.is_byte, byte_ids)) else None
        names = sorted(self.special_tokens, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")

    def __reduce__(self) -> tuple[type, tuple[TokenizerFiles]]:
        return SentencePieceTokenizer, (self.files,)

    def encode(
        self, text: str, *, allow_special: bool = False, continues: bool = False
    ) -> list[int]:
        """Ids of `text`, without bos or eos; DataError when it is not valid Unicode."""
        check_unicode(text)
        if not allow_special:
            return self._encode(text, continues)
        ids: list[int] = []
        for part in filter(None, self._special.split(text)):
            if part in self.special_tokens:
                ids.append(self.special_tokens[part])
                continues = not self._adds_space_again
            else:
                ids += self._encode(part, continues)
        return ids

    def _encode(self, text: str, continues: bool) -> list[int]:
        if continues:
            return self._encode(GUARD + text, False)[self._num_guard_ids :]
        if SPACE not in text or self._adds_space or self._space_char_ids is None:
            return self._processor.encode(text)
        # A literal U+2581 would come back as a space, so it goes in as its three bytes.
        first, *rest = self._processor.encode(text.split(SPACE))
        return first + [i for ids in rest for i in (*self._space_char_ids, *ids)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, control pieces nothing."""
        return decode(self, ids)

    def piece(self, token_id: int) -> str:
        """Name of a piece in the model, such as `</s>`."""
        return self._processor.id_to_piece(token_id)

    def piece_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        """UTF-8 bytes of a piece, at the start of a text where `first`; control ones have none."""
        check_id(token_id, self.vocab_size)
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


def _load(files: TokenizerFiles) -> sentencepiece.SentencePieceProcessor:
    """The library's model; DataError, by the name of what it is instead, where there is none."""
    try:
        if files.data:  # the library takes an empty file for no file
            processor = sentencepiece.SentencePieceProcessor(model_proto=files.data)
            for token_id in range(processor.vocab_size()):
                processor.id_to_piece(token_id)  # fails where it is not UTF-8
            return processor
    except (RuntimeError, UnicodeDecodeError):
        pass
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", files.data[:4096]):
        problem = f"{files.path} is a list of byte pairs in tiktoken's base64 form"
        right = "the tokenizer.json of the same model would work"
        raise DataError(f"{problem}, which does not say how text is split; {right}.")
    problem = f"{files.path} is not a SentencePiece model, nor a tokenizer.json or .tok.json"
    right = "a file that `grok data tokenizer` wrote, or one of the release, would work"
    raise DataError(f"{problem}; {right}.")


def _check_settings(files: TokenizerFiles, special: Mapping[str, int], vocab_size: int) -> None:
    """Raises DataError where tokenizer_config.json has tokens that the model does not have."""
    for token_id, token in files.added_tokens().items():
        if not token_id.isdigit() or int(token_id) >= vocab_size:
            problem = f"{SETTINGS_FILE} adds {token.get('content')!r:.60} with id {token_id} to it"
            right = "the tokenizer.json of the same release, which has all tokens, would work"
            raise DataError(f"{files.path}: {problem}; {right}.")
    name = files.token_setting("eos_token")
    if name is not None and name not in special:
        problem = f"{SETTINGS_FILE} names the eos_token {name!r:.60}, which is no control piece"
        raise DataError(f"{files.path}: {problem}; {', '.join(special)} are.")


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
    return SentencePieceTokenizer(TokenizerFiles(SENTENCEPIECE, model.getvalue(), str(out_path)))


def _refusal(message: str, files: Sequence[str | Path], vocab_size: int) -> DataError:
    """SentencePiece's refusal of a vocabulary size, as a sentence with a size that would work."""
    names = ", ".join(map(str, files[:NAMED_FILES]))
    if len(files) > NAMED_FILES:
        names += f" and {len(files) - NAMED_FILES} more"
    vocabulary = f"a vocabulary of {vocab_size} pieces"
    problem = f"SentencePiece cannot train a tokenizer on {names}: {message}"
    if match := re.search(r"Please set it to a value <= (\d+)", message):
        problem = f"the text of {names} is too short for {vocabulary}; {match[1]} would work."
    elif match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        characters = f"the 256 bytes and the characters of {names}"
        problem = f"{vocabulary} cannot hold {characters}; {int(match[1]) + 1} would work."
    return DataError(problem)
