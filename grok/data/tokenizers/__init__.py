"""Tokenizers: text to token ids and back, whichever library is behind the file."""

from collections.abc import Callable
from pathlib import Path

from grok.data.tokenizers.byte_pairs import BytePairTokenizer
from grok.data.tokenizers.files import (
    SENTENCEPIECE,
    TOK_JSON,
    TOKENIZER_JSON,
    TOKENIZER_NAMES,
    TokenizerFiles,
    read_tokenizer_files,
    tokenizer_file,
)
from grok.data.tokenizers.huggingface import HuggingFaceTokenizer
from grok.data.tokenizers.sentencepiece import SentencePieceTokenizer
from grok.data.tokenizers.tokenizer import (
    StreamDecoder,
    Tokenizer,
    config_ids,
    encode_prompt,
    start_ids,
    token_bytes,
)

__all__ = [
    "TOKENIZER_NAMES",
    "StreamDecoder",
    "Tokenizer",
    "config_ids",
    "encode_prompt",
    "load_tokenizer",
    "make_tokenizer",
    "start_ids",
    "token_bytes",
    "tokenizer_file",
]

KINDS: dict[str, Callable[[TokenizerFiles], Tokenizer]] = {
    SENTENCEPIECE: SentencePieceTokenizer,
    TOKENIZER_JSON: HuggingFaceTokenizer,
    TOK_JSON: BytePairTokenizer,
}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a tokenizer's file, or that of a run's or a release's folder, with the settings beside
    it, local, at gs:// or of hf://ORG/NAME. DataError where it is missing, damaged, or of a kind
    that cannot be expressed."""
    return make_tokenizer(read_tokenizer_files(path))


def make_tokenizer(files: TokenizerFiles) -> Tokenizer:
    """The tokenizer in these files; DataError where they are damaged or cannot be expressed."""
    return KINDS[files.name](files)
