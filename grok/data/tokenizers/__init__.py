"""Tokenizers: text to token ids and back, whichever library is behind the file."""

from pathlib import Path

from grok import storage
from grok.data.tokenizers.sentencepiece import SentencePieceTokenizer
from grok.data.tokenizers.tokenizer import StreamDecoder, Tokenizer, token_bytes
from grok.errors import DataError

__all__ = ["StreamDecoder", "Tokenizer", "load_tokenizer", "parse_tokenizer", "token_bytes"]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a tokenizer file; DataError when it is missing or of no known kind."""
    return parse_tokenizer(storage.read_bytes(path, DataError), path)


def parse_tokenizer(data: bytes, path: str | Path) -> Tokenizer:
    """The tokenizer in the bytes of the file `path`; DataError when they are of no known kind."""
    try:
        return SentencePieceTokenizer(data)
    except RuntimeError:
        problem = f"{path} is not a SentencePiece model; a file that `grok data tokenizer` wrote"
        raise DataError(f"{problem}, or the release's tokenizer.model, would work.") from None
