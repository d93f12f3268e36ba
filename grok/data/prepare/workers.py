"""Records tokenised by many processes, their results in the order of the records."""

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

# A record with what is kept of its file; and with what became of it: a document, or a reason.
RecordGroup = list[tuple[RawRecord, dict[str, Any]]]
Result = tuple[RawRecord, EncodedDocument | str]


def encode_records(
    units: Iterator[RecordGroup], tokenizer: Tokenizer, fields: RecordFields, workers: int
) -> Generator[Result, None, None]:
    """What becomes of each record, in order."""
    if workers == 1:
        encoder = DocumentEncoder(tokenizer, fields)
        for unit in units:
            yield from _outcomes(unit, _encode_unit(unit, encoder))
        return
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer, fields),
    )
    try:
        waiting: collections.deque[tuple[RecordGroup, Future]] = collections.deque()
        while True:
            # Enough ahead that no process waits while a slow unit is first in line.
            for unit in itertools.islice(units, 4 * workers - len(waiting)):
                waiting.append((unit, pool.submit(_encode_unit, unit)))
            if not waiting:
                return
            unit, future = waiting.popleft()
            yield from _outcomes(unit, future.result())
    except BrokenProcessPool:
        raise DataError(
            "a process that tokenised was ended from outside (was memory short?); the same command "
            "goes on, and fewer --workers need less memory."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _outcomes(unit: RecordGroup, results: list[EncodedDocument | str]) -> Iterator[Result]:
    for (raw, _), result in zip(unit, results, strict=True):
        yield raw, result


# A process's own, made once: loading the tokenizer takes longer than a unit.
_encoder: DocumentEncoder | None = None


def _start_worker(tokenizer: Tokenizer, fields: RecordFields) -> None:
    global _encoder
    # Ctrl-C goes to all processes of a terminal; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = DocumentEncoder(tokenizer, fields)


def _end_with_parent() -> None:
    """Ends this process when the one that started it was killed, which says nothing to it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _encode_unit(
    unit: RecordGroup, encoder: DocumentEncoder | None = None
) -> list[EncodedDocument | str]:
    """For each record its document, or why it has none."""
    encoder = encoder or _encoder
    assert encoder is not None
    results: list[EncodedDocument | str] = []
    for raw, kept in unit:
        try:
            results.append(encoder.encode(raw, kept))
        except BadRecord as error:
            results.append(str(error))
    return results
