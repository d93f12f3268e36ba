"""Text files as one stream of tokens, and losses over it in bits per byte.

S tokens of the stream.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from grok import storage
from grok.errors import DataError

if TYPE_CHECKING:
    from grok.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenStream:
    """Documents end to end, each ended by `eos_id`.

    tokens_S: int32 ids; num_bytes: UTF-8 bytes of the text (eos has none).
    """

    tokens_S: np.ndarray
    num_bytes: int
    eos_id: int


def read_text(path: str | Path) -> str:
    """Text of a UTF-8 file, line ends as they are.

    DataError when the file is missing or empty, or naming its first byte that is not UTF-8.
    """
    data = storage.read_bytes(path, DataError)
    if not data:
        raise DataError(f"text file {path} is empty; one with text would work.")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"text file {path} is not UTF-8 at byte offset {error.start} "
            f"(0x{data[error.start]:02x}); the file re-encoded as UTF-8 would work."
        ) from None


def read_stream(
    paths: Sequence[str | Path], tokenizer: "Tokenizer", vocab_size: int
) -> TokenStream:
    """Tokenizes text files, a document each, for a model of `vocab_size` tokens.

    DataError when there are no files, a file cannot be read, the tokenizer has no end-of-sequence
    token, or a token is not below `vocab_size`.
    """
    if not paths:
        raise DataError("no text files were given (data.train, data.validation); one would work.")
    if tokenizer.eos_id < 0:
        raise DataError(
            "the tokenizer has no end-of-sequence token to end documents with; one that `grok data "
            "tokenizer` trained would work."
        )
    documents, num_bytes = [], 0
    for path in paths:
        text = read_text(path)
        document_S = np.array([*tokenizer.encode(text), tokenizer.eos_id], np.int32)
        if document_S.max() >= vocab_size:
            raise DataError(
                f"text file {path} has token {document_S.max()}, but model.vocab_size={vocab_size}"
                f"; model.vocab_size={tokenizer.vocab_size}, as the tokenizer has, would work."
            )
        documents.append(document_S)
        num_bytes += len(text.encode())
    return TokenStream(
        tokens_S=np.concatenate(documents), num_bytes=num_bytes, eos_id=tokenizer.eos_id
    )


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Summed loss of a text in nats, as bits per UTF-8 byte: comparable across tokenizers."""
    return nats / math.log(2) / num_bytes
