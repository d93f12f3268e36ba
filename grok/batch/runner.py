"""The work of a job: the engine kept busy with the requests of the missing shards."""

import collections
import time
from collections.abc import Iterator
from typing import Any

from grok import distributed
from grok.batch.items import COLUMNS, BatchItem, read_item, reason
from grok.batch.job_dir import Input, JobDir, scan_input
from grok.batch.replicas import Replica
from grok.config.batch import BatchConfig
from grok.data.prepare.sources import RawRecord
from grok.data.tokenizers import Tokenizer
from grok.errors import SAVED, GrokError, RequestError
from grok.infer.loader import ServedModel
from grok.infer.openai.requests import RequestParser
from grok.infer.openai.responses import ResponseBuilder
from grok.infer.request import Output
from grok.preemption import PreemptionSignal
from grok.progress import ProgressDisplay

# Answers that wait for a place in the engine: enough that it never idles, and that it sees prompts
# with a common prefix together.
AHEAD = 256


class Stopped(GrokError):
    """A job that was asked to stop; the shards that are whole stay."""

    exit_code = SAVED


class _Shard:
    """A shard on its way: its lines so far, and what is counted of them."""

    def __init__(self, size: int):
        self.lines: list[str | None] = [None] * size
        self.left = size
        self.counts: collections.Counter[str] = collections.Counter(requests=size)
        self.failures: collections.Counter[str] = collections.Counter()
        self.finish_reasons: collections.Counter[str] = collections.Counter()

    def put(self, place: int, line: str) -> None:
        self.lines[place] = line
        self.left -= 1

    def statistics(self, seconds: float) -> dict[str, Any]:
        names = ("requests", "answered", "failed", "prompt_tokens", "completion_tokens")
        return {
            **{name: self.counts[name] for name in names},
            "failures": dict(sorted(self.failures.items())),
            "finish_reasons": dict(sorted(self.finish_reasons.items())),
            "seconds": round(seconds, 3),
        }


class BatchRunner:
    """The missing shards of a replica's share, done by its engine."""

    def __init__(
        self,
        engine: Any,
        tokenizer: Tokenizer,
        reader: RequestParser,
        found: Input,
        folder: JobDir,
        replica: Replica,
        seed: int,
    ):
        self._engine, self._tokenizer, self._reader = engine, tokenizer, reader
        self._found, self._folder, self._replica, self._seed = found, folder, replica, seed
        self._shards: dict[int, _Shard] = {}
        self._items: dict[str, tuple[int, BatchItem, ResponseBuilder]] = {}
        self._written_at = time.monotonic()
        self.done = 0

    def run(self, shards: list[int], stop: PreemptionSignal, display: ProgressDisplay) -> None:
        """Does these shards. Raises Stopped where the process was asked to stop before its end."""
        self._written_at = time.monotonic()
        records = self._found.read(shards)
        more = True
        while more or self._engine.unfinished:
            if stop.should_stop():
                raise Stopped("asked to stop; the same command goes on with the missing shards.")
            while more and self._engine.stats.waiting < AHEAD:
                more = self._submit_next(records)
            for output in self._engine.step():
                self._take(output)
            stats = self._engine.stats
            if stats.tokens_out:  # what was before is compilation, and no part of the pace
                display.update(
                    self.done,
                    f"{display.rate('in', stats.tokens_in):,.0f} tokens/s in",
                    f"{display.rate('out', stats.tokens_out):,.0f} tokens/s out",
                )

    def _submit_next(self, records: Iterator[tuple[int, int, RawRecord]]) -> bool:
        """Hands the next record to the engine; False where there is none."""
        shard, index, record = next(records, (None, 0, None))
        if shard is None or record is None:
            return False
        if shard not in self._shards:
            self._shards[shard] = _Shard(self._found.size(shard))
        item = read_item(index, record, self._reader)
        error = item.error or self._submit(shard, item)
        if error is not None:
            self._shards[shard].counts["failed"] += 1
            self._shards[shard].failures[reason(error)] += 1
            self._put(shard, item, item.failed(error))
        return True

    def _submit(self, shard: int, item: BatchItem) -> RequestError | None:
        """Gives the engine the requests of an item, all or none of them."""
        assert item.call is not None
        submitted = []
        try:
            for request in item.requests(self._seed):
                self._engine.submit(request)
                submitted.append(request.id)
        except RequestError as error:
            for request_id in submitted:
                self._engine.cancel(request_id)
            return error
        self._items[str(item.index)] = shard, item, ResponseBuilder(item.call, self._tokenizer)
        return None

    def _take(self, output: Output) -> None:
        key = output.request_id.partition("/")[0]
        if key not in self._items:
            return  # of an item of which another request was refused
        shard, item, answers = self._items[key]
        answers.add(output)
        if not answers.finished:
            return
        del self._items[key]
        self._shards[shard].counts["answered"] += 1
        self._shards[shard].counts.update(answers.usage())
        self._shards[shard].finish_reasons.update(map(str, answers.finish_reasons))
        self._put(shard, item, item.answered(answers))

    def _put(self, number: int, item: BatchItem, line: str) -> None:
        """Sets an item's line, and writes the shard where it was the last."""
        shard = self._shards[number]
        shard.put(item.index - number * self._found.shard_size, line)
        self.done += 1
        if shard.left == 0:
            del self._shards[number]
            now = time.monotonic()
            if self._replica.writes:
                lines = [line for line in shard.lines if line is not None]
                self._folder.write(number, lines, shard.statistics(now - self._written_at))
            self._written_at = now


def run(config: BatchConfig, replica: Replica) -> None:
    """Does what is missing of a job, or of this replica's share of it.

    Raises ConfigError, DataError and CheckpointError for what cannot work, and Stopped.
    """
    display = ProgressDisplay(
        "requests {done:,}/{total:,}", note="compiling", quiet=not replica.writes
    )
    log = display.log
    log(f"reading {', '.join(config.input)}")
    found = scan_input(config, COLUMNS)
    folder = JobDir(config.output)
    model = ServedModel(config, spans_all_hosts=replica.spans_all_hosts)

    def prepare_folder() -> list[int]:
        folder.open(config, model.identity(), found)
        return sorted(folder.done())

    done = set(
        distributed.broadcast_from_primary(prepare_folder)
        if replica.spans_all_hosts
        else prepare_folder()
    )
    share = range(replica.number, len(found.starts), replica.count)
    missing = [shard for shard in share if shard not in done]
    log(f"{found.requests:,} requests; {len(done):,} of {len(found.starts):,} shards are done")
    if missing:
        requests = sum(found.size(shard) for shard in share)
        engine = model.engine(log)
        reader = model.parser()
        work = BatchRunner(engine, model.tokenizer, reader, found, folder, replica, config.seed)
        display.total = requests
        display.done = work.done = requests - sum(found.size(shard) for shard in missing)
        with PreemptionSignal(model.mesh) as stop, display:
            work.run(missing, stop, display)
    if replica.writes and len(folder.done()) == len(found.starts):
        summary = folder.summarise(found)
        log(_total(summary, config.output))
    else:
        log("this share is done; other processes have theirs")


def _total(summary: dict[str, Any], output: str) -> str:
    """What came of a job, in a few words."""
    failures = sorted(summary.get("failures", {}).items(), key=lambda pair: -pair[1])
    reasons = [f"{name} {count:,}" for name, count in failures]
    why = f" ({', '.join(reasons)})" if reasons else ""
    return (
        f"{summary['answered']:,} of {summary['requests']:,} requests answered, "
        f"{summary['failed']:,} failed{why}; {summary['prompt_tokens']:,} tokens in, "
        f"{summary['completion_tokens']:,} out: see {output}"
    )
