"""Rows of a Parquet file as dictionaries, in memory that a small file cannot blow up: a value that
stands in many rows is held once, and rows become Python objects only after their size is known."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from grok.data.prepare.streams import Damaged

BATCH_ROWS = 256  # decoded at once


class ParquetRow(NamedTuple):
    """A row, from 1, or the `problem` in its place and in that of all `rows` from there."""

    line: int
    data: dict[str, Any] | None
    problem: str | None
    rows: int = 1
    is_damage: bool = False


def read_parquet(
    file: BinaryIO, columns: Sequence[str], most_bytes: int
) -> tuple[int, Iterator[ParquetRow]]:
    """The number of rows, and the rows with those of `columns` that the file has. A row whose texts
    have more than `most_bytes` is not read. Raises Damaged where nothing can be read."""
    import pyarrow
    from pyarrow import parquet

    try:
        leaves = parquet.ParquetFile(file).schema
        paths = [
            leaves.column(index).path
            for index in range(len(leaves))
            if leaves.column(index).physical_type == "BYTE_ARRAY"
        ]
        file.seek(0)
        reader = parquet.ParquetFile(file, read_dictionary=paths, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise Damaged(f"the file is no Parquet or damaged ({_first_line(error)})") from None
    names = [name for name in columns if name in reader.schema_arrow.names]
    return reader.metadata.num_rows, _rows(reader, names, most_bytes)


def _rows(reader: Any, names: Sequence[str], most_bytes: int) -> Iterator[ParquetRow]:
    import pyarrow

    first = 1
    for group in range(reader.num_row_groups):
        line = first
        first += reader.metadata.row_group(group).num_rows
        try:
            batches = reader.iter_batches(BATCH_ROWS, [group], names, use_threads=False)
            rows = (_batch_rows(batch, most_bytes) for batch in batches)
            for data, problem in itertools.chain.from_iterable(rows):
                yield ParquetRow(line, data, problem)
                line += 1
        except (pyarrow.ArrowException, OSError) as error:
            problem = f"the rest of row group {group} is damaged ({_first_line(error)})"
            yield ParquetRow(line, None, problem, first - line, is_damage=True)


def _batch_rows(batch: Any, most_bytes: int) -> Iterator[tuple[dict[str, Any] | None, str | None]]:
    is_long = _text_bytes(batch.columns) > most_bytes
    for index in range(batch.num_rows):
        row = batch.slice(index, 1)
        if is_long and _text_bytes(row.columns) > most_bytes:
            yield None, f"has more than {most_bytes:,} bytes"
            continue
        try:
            yield _row(row), None
        except UnicodeDecodeError as error:
            yield None, f"is not UTF-8 at byte {error.start} (0x{error.object[error.start]:02x})"
        except (ValueError, OverflowError) as error:
            yield None, f"has a value that Python cannot hold: {_first_line(error)}"


def _row(row: Any) -> dict[str, Any]:
    try:
        # A batch without columns has rows, but to_pylist gives none.
        return (row.to_pylist() or [{}])[0]
    except UnicodeDecodeError:
        raise
    except (ValueError, OverflowError):
        # A point in time that Python cannot hold, in nanoseconds or a far year, is read as text.
        for index, name in enumerate(row.schema.names):
            if _is_temporal(row.column(index).type):
                row = row.set_column(index, name, row.column(index).cast("string"))
        return row.to_pylist()[0]


def _is_temporal(kind: Any) -> bool:
    from pyarrow import types

    return any(is_kind(kind) for is_kind in (types.is_timestamp, types.is_date, types.is_time))


def _text_bytes(columns: Sequence[Any]) -> int:
    return sum(map(_bytes_of, columns))


def _bytes_of(column: Any) -> int:
    """Bytes of the texts in a column, each counted wherever it stands; of other values, their own
    size."""
    from pyarrow import compute, types

    kind = column.type
    if types.is_dictionary(kind):
        lengths = compute.binary_length(column.dictionary)
        return compute.sum(lengths.take(column.indices)).as_py() or 0
    if types.is_struct(kind):
        return _text_bytes(column.flatten())
    if types.is_list(kind) or types.is_large_list(kind):
        return column.nbytes if types.is_primitive(kind.value_type) else _bytes_of(column.flatten())
    return column.nbytes


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
