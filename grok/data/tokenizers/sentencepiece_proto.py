"""The parts of a SentencePiece model file that its library has no function for: pieces with their
kinds, and the settings of its training and normalizer.
https://protobuf.dev/programming-guides/encoding, with the fields of sentencepiece_model.proto."""

import dataclasses
import struct
from collections.abc import Iterator, Sequence

# Kinds of pieces.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BPE = 2  # a model's type; 1 is unigram, the default


@dataclasses.dataclass(frozen=True)
class SentencePieceModel:
    """A model's pieces (text, score, kind), its type, the name of its normalization, and whether it
    writes a space before a text and drops spaces that stand beside others."""

    pieces: Sequence[tuple[str, float, int]]
    model_type: int
    normalization: str
    adds_space: bool
    drops_spaces: bool


def parse_model(data: bytes) -> SentencePieceModel:
    """The model in a file's bytes, which the library has read without an error."""
    pieces = []
    trainer: dict[int, bytes | int] = {}
    normalizer: dict[int, bytes | int] = {}
    for field, value in _fields(data):
        if field == 1:
            piece = dict(_fields(_bytes(value)))
            (score,) = struct.unpack("<f", _bytes(piece.get(2, bytes(4))))
            kind = _number(piece.get(3, NORMAL))
            pieces.append((_bytes(piece.get(1, b"")).decode(), score, kind))
        elif field == 2:
            trainer = dict(_fields(_bytes(value)))
        elif field == 3:
            normalizer = dict(_fields(_bytes(value)))
    return SentencePieceModel(
        pieces,
        model_type=_number(trainer.get(3, 1)),
        normalization=_bytes(normalizer.get(1, b"")).decode(),
        adds_space=bool(normalizer.get(3, 1)),
        drops_spaces=bool(normalizer.get(4, 1)),
    )


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Yields number and value of each field of a message: an integer, or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        field, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield field, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}[wire]
        yield field, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _bytes(value: bytes | int) -> bytes:
    assert not isinstance(value, int)
    return value


def _number(value: bytes | int) -> int:
    assert isinstance(value, int)
    return value
