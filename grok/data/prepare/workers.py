"""Records tokenized by several processes, their results in the order of the records."""

import collections
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from grok.data.prepare.records import BadRecord, DocumentEncoder, EncodedDocument, RecordFields
from grok.data.prepare.sources import RawRecord
from grok.data.tokenizers import Tokenizer
from grok.errors import DataError

# Records with the metadata of their files; and a record with its document, or why it has none.
RecordGroup = list[tuple[RawRecord, dict[str, Any]]]
Result = tuple[RawRecord, EncodedDocument | str]


def encode_records(
    groups: Iterator[RecordGroup], tokenizer: Tokenizer, fields: RecordFields, workers: int
) -> Generator[Result, None, None]:
    """Yields each record with its document, or why it has none, in order."""
    if workers == 1:
        encoder = DocumentEncoder(tokenizer, fields)
        for group in groups:
            yield from _with_records(group, _encode_group(group, encoder))
        return
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer, fields),
    )
    try:
        pending: collections.deque[tuple[RecordGroup, Future]] = collections.deque()
        while True:
            # Enough ahead that no process waits while a slow group is first in line.
            for group in itertools.islice(groups, 4 * workers - len(pending)):
                pending.append((group, pool.submit(_encode_group, group)))
            if not pending:
                return
            group, future = pending.popleft()
            yield from _with_records(group, future.result())
    except BrokenProcessPool:
        raise DataError(
            "a process that tokenized was killed (was memory short?); the same command continues, "
            "and fewer --workers need less memory."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _with_records(group: RecordGroup, results: list[EncodedDocument | str]) -> Iterator[Result]:
    for (raw, _), result in zip(group, results, strict=True):
        yield raw, result


# Made once in each process: loading the tokenizer takes longer than a group.
_encoder: DocumentEncoder | None = None


def _start_worker(tokenizer: Tokenizer, fields: RecordFields) -> None:
    global _encoder
    # Ctrl-C reaches all processes of a terminal; the main one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = DocumentEncoder(tokenizer, fields)


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone, even after SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _encode_group(
    group: RecordGroup, encoder: DocumentEncoder | None = None
) -> list[EncodedDocument | str]:
    """The document of each record, or why it has none."""
    encoder = encoder or _encoder
    assert encoder is not None
    results: list[EncodedDocument | str] = []
    for raw, metadata in group:
        try:
            results.append(encoder.encode(raw, metadata))
        except BadRecord as error:
            results.append(str(error))
    return results
