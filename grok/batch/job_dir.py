"""A batch job on disk: its input in numbered shards, and its output folder. That has `job.json`
(all that the answers depend on), `answers/000000.jsonl` and on, each written atomically,
`statistics/` beside them, and at the end `summary.json`."""

import collections
import dataclasses
import glob
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import xxhash

from grok import storage
from grok.batch.items import id_of
from grok.config.infer import BatchConfig
from grok.config.load import to_dict
from grok.data.prepare import sources
from grok.data.prepare.sources import COMPRESSIONS, SUFFIXES, RawRecord, SourceFile
from grok.errors import ConfigError, DataError
from grok.resumable import difference

JOB_FILE, SUMMARY_FILE = "job.json", "summary.json"
ANSWERS_FOLDER, STATISTICS_FOLDER = "answers", "statistics"
FORMAT_VERSION = 2
# Of the answers, in the statistics of their shard.
CHECKSUM = "answers_xxh3_128"
PATTERNS = tuple(f"*{suffix}{ending}" for suffix in SUFFIXES for ending in ("", *COMPRESSIONS))
# Changing these is allowed: it can only flip near-tied tokens, through rounding.
NOT_IDENTITY = ("max_num_seqs", "num_pages")


@dataclasses.dataclass(frozen=True)
class Input:
    """All requests of a job in order."""

    files: Sequence[SourceFile]
    columns: Sequence[str]
    shard_size: int
    seed: int  # of requests that set none
    requests: int  # their number
    sha256: str  # of the records, whatever files they are in
    starts: Sequence[tuple[int, int]]  # of each shard: number of a file, and of a record in it
    repeated_ids: int  # requests with the id of an earlier one
    most_bytes: int  # of a record

    def size(self, shard: int) -> int:
        """Number of requests of a shard."""
        return min(self.shard_size, self.requests - shard * self.shard_size)

    def read(self, shards: Iterable[int]) -> Iterator[tuple[int, int, RawRecord]]:
        """Shard, index and record of every request of these shards, which must ascend. Files are
        streamed: records between the shards are skipped, and files without any are not opened."""
        records: Iterator[RawRecord] = iter(())
        file, index = -1, 0
        for shard in shards:
            first = shard * self.shard_size
            if self.starts[shard][0] > file:
                start, index = self.starts[shard], first
                records = sources.read_records(self.files, self.columns, start, self.most_bytes)
            skipped = first - index
            for record in itertools.islice(records, skipped, skipped + self.size(shard)):
                file = record.file
                yield shard, first, record
                first += 1
            index = first


def scan_input(config: BatchConfig, columns: Sequence[str]) -> Input:
    """Reads the input once, to count its requests and hash them. Raises DataError where there is
    none, a file is damaged or of no kind that holds requests, or too many ids are repeated."""
    files = sources.find_files(_expand(config.input), PATTERNS)
    for file in files:
        if file.format == "text":
            kinds = f"{', '.join(SUFFIXES)}, perhaps with {' or '.join(COMPRESSIONS)}"
            problem = f"input {file.name} is neither JSON lines nor Parquet by its name"
            raise DataError(f"{problem}; {kinds}, would work.")
    digest, starts, count = hashlib.sha256(), [], 0
    ids: set[bytes] = set()
    with_id = 0
    for record in sources.read_records(files, columns, most_bytes=config.max_record_bytes):
        # A bad record gets a line of its own with the error; damage to the file stops the job.
        if record.is_damage:
            problem = f"input {files[record.file].name}: {record.problem}"
            raise DataError(f"{problem}; an undamaged copy of the file would work.")
        if (record_id := id_of(record)) is not None:
            with_id += 1
            ids.add(hashlib.blake2b(json.dumps(record_id).encode(), digest_size=8).digest())
        if count % config.shard_size == 0:
            starts.append((record.file, record.number))
        data = record.data
        if not isinstance(data, bytes):
            data = json.dumps([data, record.problem], sort_keys=True, default=repr).encode()
        digest.update(len(data).to_bytes(8) + data)
        count += 1
    if not count:
        raise DataError(f"input {', '.join(config.input)} has no requests; one would work.")
    repeated = with_id - len(ids)
    if repeated > config.max_repeated_ids * count:
        enough = math.ceil(100 * repeated / count) / 100
        problem = f"{repeated:,} of {count:,} requests have the id of an earlier one"
        limit = f"more than max_repeated_ids={config.max_repeated_ids:g} allows"
        raise DataError(f"{problem}, {limit}; max_repeated_ids={enough} would work.")
    return Input(
        files=files,
        columns=columns,
        shard_size=config.shard_size,
        seed=config.seed,
        requests=count,
        sha256=digest.hexdigest(),
        starts=starts,
        repeated_ids=repeated,
        most_bytes=config.max_record_bytes,
    )


def _expand(patterns: Sequence[str]) -> list[str]:
    paths: list[str] = []
    for pattern in patterns:
        matches = [pattern]
        if storage.exists(pattern, DataError):
            pass  # whatever characters its name has
        elif glob.has_magic(pattern) and storage.is_remote(pattern):
            with storage.errors(f"input {pattern}", DataError, "cannot be listed"):
                system, inside = storage.remote(pattern)
                try:
                    matches = [f"gs://{name}" for name in sorted(system.glob(inside))]
                except FileNotFoundError:  # no such bucket
                    matches = []
        elif glob.has_magic(pattern):
            matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise DataError(f"input {pattern} matches no files; one that does would work.")
        paths += matches
    return paths


class JobDir:
    """The output folder of a job."""

    def __init__(self, path: str):
        self._path = path

    def open(self, config: BatchConfig, model_identity: dict[str, Any], requests: Input) -> None:
        """Makes it this job's folder, or checks that it is already. Raises ConfigError where it
        has answers of another job."""
        settings = to_dict(config)
        for key in NOT_IDENTITY:
            del settings["engine"][key]
        names = (
            *("shard_size", "seed", "sampling", "engine"),
            *("chat_template", "allow_special_tokens"),
        )
        job = {
            "format": FORMAT_VERSION,
            **{name: settings[name] for name in names},
            **model_identity,
            "input": {"requests": requests.requests, "sha256": requests.sha256},
        }
        path = storage.join(self._path, JOB_FILE)
        if not storage.exists(path):
            try:
                if self.shards():
                    problem = f"output={self._path} has answers and no {JOB_FILE} that says of what"
                    raise ConfigError(f"{problem}; an empty or new folder would work.")
                storage.write_bytes(path, _json(job))
            except OSError as error:
                problem = f"output={self._path} cannot be written: {storage.reason(error)}"
                raise ConfigError(f"{problem}; a folder, there or not, would work.") from None
            return
        try:
            changed = difference(json.loads(storage.read_bytes(path)), job)
        except ValueError as error:
            raise ConfigError(f"{path} is no JSON: {error}; another output would work.") from None
        if changed:
            problem = f"output={self._path} has answers of another job: {changed}"
            raise ConfigError(f"{problem}; what it was, or another output, would work.")

    def shards(self) -> set[int]:
        """Numbers of the shards that are written."""
        folder = storage.join(self._path, ANSWERS_FOLDER)
        if not storage.exists(folder):
            return set()
        names = [re.fullmatch(r"(\d{6,})\.jsonl", name) for name in storage.list_files(folder)]
        return {int(name[1]) for name in names if name}

    def done(self, log: Callable[[str], object]) -> set[int]:
        """Numbers of the shards whose answers are as they were written. `log` is called with a
        sentence for each other one."""
        damaged = {shard for shard in self.shards() if not self._is_as_written(shard)}
        for shard in sorted(damaged):
            log(f"{self._answers(shard)} is not as it was written; it is answered again")
        return self.shards() - damaged

    def _is_as_written(self, shard: int) -> bool:
        try:
            saved = self._read_statistics(shard)[CHECKSUM]
        except (ValueError, KeyError, TypeError, FileNotFoundError):
            return False
        return saved == _checksum(storage.read_bytes(self._answers(shard)))

    def _answers(self, shard: int) -> str:
        return storage.join(self._path, ANSWERS_FOLDER, f"{shard:06d}.jsonl")

    def _read_statistics(self, shard: int) -> dict[str, Any]:
        path = storage.join(self._path, STATISTICS_FOLDER, f"{shard:06d}.json")
        return json.loads(storage.read_bytes(path))

    def write(self, shard: int, lines: Sequence[str], statistics: dict[str, Any]) -> None:
        """Writes a shard: its statistics first, so that they are there wherever answers are."""
        data = "".join(f"{line}\n" for line in lines).encode()
        path = storage.join(self._path, STATISTICS_FOLDER, f"{shard:06d}.json")
        storage.write_bytes(path, _json({**statistics, CHECKSUM: _checksum(data)}))
        storage.write_bytes(self._answers(shard), data)

    def summarise(self, requests: Input) -> dict[str, Any]:
        """Adds up the statistics of all shards of these requests, and writes `summary.json`."""
        shards = len(requests.starts)
        total: collections.Counter[str] = collections.Counter()
        for shard in range(shards):
            statistics = self._read_statistics(shard)
            del statistics[CHECKSUM]
            total.update(statistics)
        summary: dict[str, Any] = {"shards": shards, "repeated_ids": requests.repeated_ids}
        for name, value in total.items():
            section, _, key = name.rpartition(".")
            (summary.setdefault(section, {}) if section else summary)[key] = value
        for name in ("prompt_tokens", "completion_tokens"):
            summary[f"{name}_per_second"] = round(total[name] / max(total["seconds"], 1e-9), 3)
        storage.write_bytes(storage.join(self._path, SUMMARY_FILE), _json(summary))
        return summary


def _checksum(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()
