"""Runs a batch job: keeps the engine busy with the requests of the missing shards."""

import collections
import contextlib
import dataclasses
import time
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

from grok import compile_cache, distributed
from grok.batch.items import COLUMNS, INTERNAL, BatchItem, failure_key, read_item
from grok.batch.job_dir import Input, JobDir, scan_input
from grok.cluster import env_cluster
from grok.config.infer import BatchConfig
from grok.data.prepare.sources import RawRecord
from grok.errors import SAVED, EngineError, GrokError
from grok.hardware import configure_devices, has_tpu
from grok.infer.loader import ServedModel
from grok.infer.openai.responses import ResponseBuilder
from grok.infer.request import Output, submit_all
from grok.preemption import PreemptionSignal
from grok.progress import ProgressDisplay


@dataclasses.dataclass(frozen=True)
class Replica:
    """A model on the devices of one host or of all: number `index` of `count`."""

    index: int
    count: int
    writes: bool  # this process writes and prints for its replica
    spans_all_hosts: bool  # its mesh does: they make the same calls in the same order


@contextlib.contextmanager
def join_replica(config: BatchConfig) -> Iterator[Replica]:
    """Gives the replica of this process. Replicas of one host each are independent: they do not
    connect, and one that fails leaves the others to their shares. Hosts of one TPU slice start and
    end together, as its runtime demands, and so do hosts that one mesh spans."""
    cluster, simulated = env_cluster(), config.mesh.simulated_devices
    if config.replica == "host" and (cluster or not has_tpu()):
        configure_devices(simulated)
        _share_programs(config)
        _, count, index = cluster or ("", 1, 0)
        yield Replica(index, count, True, False)
        return
    with distributed.exit_together():
        distributed.initialize(config)
        count = distributed.process_count()
        if config.replica == "all":
            configure_devices(simulated // count)
            _share_programs(config)
            yield Replica(0, 1, distributed.is_primary(), count > 1)
        else:
            configure_devices(simulated)
            _share_programs(config)
            yield Replica(distributed.process_index(), count, True, False)
        distributed.barrier()


def _share_programs(config: BatchConfig) -> None:
    compile_cache.share(compile_cache.folder_for(config.compile_cache, config.output))


# Waiting sequences that keep the engine from idling, and let it see common prefixes together.
MIN_WAITING = 256


class Stopped(GrokError):
    """A job that was asked to stop; the shards that are written stay."""

    exit_code = SAVED


class _Shard:
    """A shard in progress: its lines so far, and their counts under dotted names."""

    def __init__(self, size: int):
        self.lines: list[str | None] = [None] * size
        self.missing = size
        zeros = dict.fromkeys(("answered", "failed", "prompt_tokens", "completion_tokens"), 0)
        self.counts = collections.Counter({"requests": size, **zeros})


class BatchRunner:
    """Answers the missing shards of a replica's share with its engine."""

    def __init__(
        self, engine: Any, model: ServedModel, requests: Input, job_dir: JobDir, replica: Replica
    ):
        self._engine, self._tokenizer, self._parser = engine, model.tokenizer, model.parser()
        self._input, self._job_dir, self._replica = requests, job_dir, replica
        self._shards: dict[int, _Shard] = {}
        self._running: dict[str, tuple[int, BatchItem, ResponseBuilder]] = {}
        self._last_write, self._lines = time.monotonic(), 0

    def run(self, shards: list[int], stop: PreemptionSignal, display: ProgressDisplay) -> None:
        """Answers these shards. Raises Stopped where the process was asked to stop before."""
        self._last_write = time.monotonic()
        records = self._input.read(shards)
        more, done = True, display.done
        while more or self._engine.unfinished:
            if stop.should_stop():
                raise Stopped("asked to stop; the same command continues with the missing shards.")
            while more and self._engine.stats.waiting < MIN_WAITING:
                more = self._submit_next(records)
            for output in self._step():
                self._take(output)
            stats = self._engine.stats
            if stats.tokens_out:  # earlier time is compilation, and no part of the pace
                counts = {"in": stats.tokens_in, "out": stats.tokens_out}
                rates = {name: display.rate(name, count) for name, count in counts.items()}
                texts = (f"{rate:,.0f} tokens/s {name}" for name, rate in rates.items())
                display.update(done + self._lines, *texts)

    def _step(self) -> list[Output]:
        try:
            return self._engine.step()
        except Exception as error:
            traceback.print_exception(error)
            lost = distributed.lost_contact(error)
            raise lost or EngineError(f"the engine broke down: {error}") from error

    def _submit_next(self, records: Iterator[tuple[int, int, RawRecord]]) -> bool:
        shard, index, record = next(records, (None, 0, None))
        if shard is None or record is None:
            return False
        if shard not in self._shards:
            self._shards[shard] = _Shard(self._input.size(shard))
        item = read_item(index, record, self._parser)
        try:
            if item.request is None:
                raise item.error or AssertionError
            submit_all(self._engine, item.engine_requests(self._input.seed))
            self._running[str(index)] = shard, item, ResponseBuilder(item.request, self._tokenizer)
        except Exception as error:
            self._fail(shard, item, error)
        return True

    def _fail(self, shard: int, item: BatchItem, error: Exception) -> None:
        """Writes why there is no answer: a RequestError, or a fault of ours."""
        self._shards[shard].counts.update(["failed", f"failures.{failure_key(error)}"])
        self._put(shard, item, item.error_line(error))

    def _take(self, output: Output) -> None:
        if (key := output.request_id.partition("/")[0]) not in self._running:
            return  # of an item of which another request was refused
        number, item, builder = self._running[key]
        try:
            builder.add(output)
            line = item.answer_line(builder) if builder.finished else None
        except Exception as error:  # of this item alone
            del self._running[key]
            for request in item.engine_requests(self._input.seed):
                self._engine.cancel(request.id)
            self._fail(number, item, error)
            return
        if line is None:
            return
        del self._running[key]
        counts = self._shards[number].counts
        counts.update(["answered", *(f"finish_reasons.{end}" for end in builder.finish_reasons)])
        counts.update(builder.usage())
        self._put(number, item, line)

    def _put(self, number: int, item: BatchItem, line: str) -> None:
        shard = self._shards[number]
        shard.lines[item.index - number * self._input.shard_size] = line
        shard.missing -= 1
        self._lines += 1
        if shard.missing == 0:
            del self._shards[number]
            now = time.monotonic()
            if self._replica.writes:
                lines = [line for line in shard.lines if line is not None]
                seconds = round(now - self._last_write, 3)
                self._job_dir.write(number, lines, {**shard.counts, "seconds": seconds})
            self._last_write = now


def run(config: BatchConfig, replica: Replica) -> None:
    """Answers the missing shards of a job, or of this replica's share of it. Raises ConfigError,
    DataError and CheckpointError for what cannot work, FolderInUse, EngineError,
    and Stopped."""
    share = replica.index, replica.count
    lock = distributed.hold_folder(config.output, share) if replica.writes else nullcontext()
    with lock:
        _run(config, replica)


def _run(config: BatchConfig, replica: Replica) -> None:
    quiet = not replica.writes
    display = ProgressDisplay("requests {done:,}/{total:,}", note="compiling", quiet=quiet)
    display.log(f"reading {', '.join(config.input)}")
    requests, job_dir = scan_input(config, COLUMNS), JobDir(config.output)
    model = ServedModel(config, spans_all_hosts=replica.spans_all_hosts)

    def open_job() -> list[int]:
        job_dir.open(config, model.identity(), requests)
        return sorted(job_dir.done(display.log))

    together = replica.spans_all_hosts
    done = set(distributed.broadcast_from_primary(open_job) if together else open_job())
    shards = len(requests.starts)
    share = range(replica.index, shards, replica.count)
    missing = [shard for shard in share if shard not in done]
    display.log(f"{requests.requests:,} requests; {len(done):,} of {shards:,} shards are done")
    if requests.repeated_ids:
        display.log(f"{requests.repeated_ids:,} requests have the id of an earlier one")
    if missing:
        runner = BatchRunner(model.engine(display.log), model, requests, job_dir, replica)
        display.total = sum(requests.size(shard) for shard in share)
        display.done = display.total - sum(requests.size(shard) for shard in missing)
        with PreemptionSignal(model.mesh) as stop, display:
            runner.run(missing, stop, display)
    if not (replica.writes and len(job_dir.shards()) == shards):
        display.log("this share is done; other processes have theirs")
        return
    summary = job_dir.summarise(requests)
    failures = sorted(summary.get("failures", {}).items(), key=lambda pair: -pair[1])
    reasons = ", ".join(f"{name} {count:,}" for name, count in failures)
    display.log(
        f"{summary['answered']:,} of {summary['requests']:,} requests answered, "
        f"{summary['failed']:,} failed{f' ({reasons})' if reasons else ''}; "
        f"{summary['prompt_tokens']:,} tokens in, {summary['completion_tokens']:,} out: "
        f"see {config.output}"
    )
    if faults := summary.get("failures", {}).get(INTERNAL):
        problem = f"{faults:,} requests failed by no fault of theirs"
        raise GrokError(f"{problem}; their lines in {config.output} say why.")
