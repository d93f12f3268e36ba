"""One raw record to one document of S tokens: its text is extracted, checked and tokenized."""

import array
import collections
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np

from grok.data.chat.encoder import ChatEncoder, Segment
from grok.data.chat.renderer import TemplateError
from grok.data.chat.template import ChatTemplate
from grok.data.dataset import encode_document
from grok.data.prepare.sources import RawRecord
from grok.data.prepare.values import (
    BadRecord,
    decode,
    field,
    in_json,
    parse_json_object,
    type_name,
)
from grok.data.tokenizers import Tokenizer, start_ids
from grok.errors import DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordFields:
    """Names of a record's fields, None for those that are not read. A record's text is in `text`,
    or it is supervised: `prompt` and `completion`, or `messages`, a list of objects with role and
    content. Then loss is on completions, or assistants' messages."""

    text: str | None = "text"
    id: str | None = None
    language: str | None = None
    licence: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None

    def names(self) -> list[str]:
        """All fields that are read."""
        return [name for name in dataclasses.asdict(self).values() if name]


class _Encoded(NamedTuple):
    """Tokens of a document, as unsigned integers; for each 1 where it bears loss; and its text."""

    tokens: array.array
    mask: bytearray
    segments: list[Segment]


class EncodedDocument(NamedTuple):
    """A document as a record, its counts, and the digests of its text and its own id."""

    record: bytes
    tokens: int
    loss_tokens: int
    text_bytes: int
    digest: bytes
    id_digest: bytes | None  # of its own id


class DocumentEncoder:
    """Makes documents of raw records; the tokenizer must have an end-of-sequence token. Special
    tokens in a text are read as such where `allow_special`; messages are written by `template`,
    which sees the date `now`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        fields: RecordFields,
        allow_special: bool = False,
        template: ChatTemplate | None = None,
        now: str | None = None,
    ) -> None:
        self._allow_special = allow_special
        self._tokenizer, self._fields = tokenizer, fields
        self._supervised = bool(fields.messages or fields.prompt)
        self._chat = template and ChatEncoder(template, tokenizer, allow_special, now)

    def encode(self, raw: RawRecord, metadata: Mapping[str, Any]) -> EncodedDocument:
        """The document of a record, with `metadata` and its own; BadRecord where it has none."""
        if raw.problem or raw.data is None:
            raise BadRecord(raw.problem)
        own: dict[str, Any] = {}
        if isinstance(raw.data, bytes) and raw.line is None:
            tokens, mask, segments = self._tokenize([Segment(decode(raw.data), True)])
        else:
            data = raw.data if isinstance(raw.data, dict) else parse_json_object(raw.data)
            tokens, mask, segments = self._encode(data)
            own = self._metadata(data)
        tokens_S = np.frombuffer(tokens, np.uintc)
        mask_S = np.frombuffer(mask, np.uint8) if self._supervised else None
        texts = [segment.text.encode() for segment in segments]
        return EncodedDocument(
            record=encode_document(tokens_S, mask_S, {**metadata, **own}),
            tokens=len(tokens_S),
            loss_tokens=int(mask_S.sum()) if mask_S is not None else len(tokens_S),
            text_bytes=sum(map(len, texts)),
            # UTF-8 has no byte 0xff, so the texts cannot run into each other.
            digest=hashlib.blake2b(b"\xff".join(texts), digest_size=16).digest(),
            id_digest=_digest(own["id"]) if "id" in own else None,
        )

    def _encode(self, data: Mapping[str, Any]) -> _Encoded:
        """The document of a record's fields."""
        if self._chat:
            return self._conversation(self._chat, field(data, self._fields.messages or "", list))
        if self._fields.prompt:
            prompt = field(data, self._fields.prompt, str)
            completion = field(data, self._fields.completion or "", str)
            return self._tokenize([Segment(prompt, False), Segment(completion, True)])
        return self._tokenize([Segment(field(data, self._fields.text or "", str), True)])

    def _conversation(self, chat: ChatEncoder, messages: list[Any]) -> _Encoded:
        """The document of messages, as the template writes them; loss is on assistants' messages
        with their ends."""
        for number, message in enumerate(messages):
            _check_message(number, message)
        try:
            conversation = chat.conversation(messages)
        except TemplateError as error:
            # The words of a template of ours are a predicate already.
            refusal = "" if chat.template.is_built_in else "is refused by the chat template: "
            problem = f"cannot be written by the chat template: {str(error).removesuffix('.')}"
            raise BadRecord(f"{refusal}{error}" if error.refused else problem) from None
        except DataError as error:
            raise BadRecord(_predicate(error)) from None
        if not any(conversation.mask):
            raise BadRecord("has no text that bears loss")
        tokens = array.array("I", conversation.ids)
        return _Encoded(tokens, bytearray(conversation.mask), conversation.segments)

    def _tokenize(self, segments: list[Segment]) -> _Encoded:
        """The document of a text, ended by eos and, where the tokenizer adds it, begun by bos."""
        if not any(segment.text.strip() for segment in segments if segment.has_loss):
            raise BadRecord("has no text that bears loss" if self._supervised else "is empty")
        start = start_ids(self._tokenizer)
        tokens, mask = array.array("I", start), bytearray(len(start))
        for segment in segments:
            ids = self._ids(segment.text, continues=len(tokens) > len(start))
            tokens.extend(ids)
            mask.extend(bytes([segment.has_loss]) * len(ids))
        tokens.append(self._tokenizer.eos_id)
        mask.append(segments[-1].has_loss)
        return _Encoded(tokens, mask, segments)

    def _ids(self, text: str, continues: bool) -> list[int]:
        try:
            return self._tokenizer.encode(
                text, allow_special=self._allow_special, continues=continues
            )
        except DataError as error:
            raise BadRecord(_predicate(error)) from None

    def _metadata(self, data: Mapping[str, Any]) -> dict[str, Any]:
        names = {key: getattr(self._fields, key) for key in ("id", "language", "licence")}
        return {
            # A surrogate in a name is no reason to lose the text.
            key: value if isinstance(value, int) else _encodable(str(in_json(value)))
            for key, name in names.items()
            if name and (value := data.get(name)) is not None
        }


def _encodable(text: str) -> str:
    return text.encode(errors="replace").decode()


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).digest()


def _check_message(number: int, message: Any) -> None:
    if not isinstance(message, dict):
        raise BadRecord(f"message {number} is no object but {type_name(message)}")
    try:
        for name in ("role", "content"):
            field(message, name, str)
    except BadRecord as error:
        raise BadRecord(f"message {number} {error}") from None


def _predicate(error: DataError) -> str:
    return str(error).partition(", which")[0].replace("the text has", "has")


# Records with the metadata of their files; and a record with its document, or why it has none.
RecordGroup = list[tuple[RawRecord, dict[str, Any]]]
Result = tuple[RawRecord, EncodedDocument | str]


def encode_records(
    groups: Iterator[RecordGroup], make_encoder: Callable[[], DocumentEncoder], workers: int
) -> Generator[Result, None, None]:
    """Yields each record with its document, or why it has none, in order. `make_encoder` goes to
    the processes that tokenize."""
    if workers == 1:
        encoder = make_encoder()
        for group in groups:
            yield from zip((raw for raw, _ in group), _encode_group(group, encoder), strict=True)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (make_encoder,))
    try:
        pending: collections.deque[tuple[RecordGroup, Future]] = collections.deque()
        while True:
            # Enough ahead that no process waits while a slow group is first in line.
            for group in itertools.islice(groups, 4 * workers - len(pending)):
                pending.append((group, pool.submit(_encode_group, group)))
            if not pending:
                return
            group, future = pending.popleft()
            yield from zip((raw for raw, _ in group), future.result(), strict=True)
    except BrokenProcessPool:
        problem = "a process that tokenized was killed (was memory short?)"
        right = "the same command continues, and fewer --workers need less memory"
        raise DataError(f"{problem}; {right}.") from None
    finally:
        pool.shutdown(cancel_futures=True)


# Made once in each process: loading the tokenizer takes longer than a group.
_encoder: DocumentEncoder | None = None


def _start_worker(make_encoder: Callable[[], DocumentEncoder]) -> None:
    global _encoder
    # Ctrl-C reaches all processes of a terminal; the main one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:  # even after its SIGKILL
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    _encoder = make_encoder()


def _encode_group(
    group: RecordGroup, encoder: DocumentEncoder | None = None
) -> list[EncodedDocument | str]:
    encoder = encoder or _encoder
    assert encoder is not None
    results: list[EncodedDocument | str] = []
    for raw, metadata in group:
        try:
            results.append(encoder.encode(raw, metadata))
        except BadRecord as error:
            results.append(str(error))
    return results
