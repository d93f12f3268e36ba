"""The share of the input that may be left out, or may repeat an id, before a job stops."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from grok import storage
from grok.data.prepare.shards import REJECTED_FILE, ShardEntry, rejected_lines
from grok.data.prepare.sources import SourceFile
from grok.errors import DataError


def num_records(totals: Mapping[str, int]) -> int:
    """All records that these counts are of."""
    return totals["documents"] + totals["duplicates"] + totals["rejected"]


def check_bad_share(
    most: float,
    files: Sequence[SourceFile],
    folder: Path,
    totals: Mapping[str, int],
    entries: Sequence[ShardEntry],
) -> None:
    """Raises DataError where more than the share `most` of the records is bad or repeats an id, or
    more of the bytes of `files` is lost; the bad records are then listed in `folder`."""
    bad, records, repeated = totals["rejected"], max(1, num_records(totals)), totals["repeated_ids"]
    lost, total = totals["lost_bytes"], max(1, sum(file.bytes for file in files))
    if repeated > most * records:
        problem = f"{repeated:,} of {records:,} records have the id of an earlier one"
        raise DataError(_over_share(problem, repeated / records, most))
    if bad <= most * records and lost <= most * total:
        return
    storage.write_bytes(folder / REJECTED_FILE, rejected_lines(entries))
    first = next(line for entry in entries for line in entry.rejected)
    where = first["file"] if first["line"] is None else f"{first['file']}:{first['line']}"
    details = f" (all are in {folder / REJECTED_FILE}); the first: {where}: {first['reason']}"
    problem, share = f"{bad:,} of {records:,} records are bad", bad / records
    if bad <= most * records:
        problem, share = f"{lost:,} of {total:,} bytes of the files cannot be read", lost / total
    raise DataError(_over_share(problem, share, most, details, max(share, lost / total)))


def _over_share(
    problem: str, share: float, most: float, details: str = "", enough: float = 0.0
) -> str:
    enough = math.ceil(100 * max(share, enough)) / 100
    limit = f"{problem}, {share:.2%}, more than --max-bad-share {most:g} allows{details}"
    return f"{limit}. The same command with --max-bad-share {enough} continues."
