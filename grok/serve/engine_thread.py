"""The engine in a thread of its own, driven from the event loop through a queue."""

import asyncio
import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from grok.infer.request import Output, Request, submit_all


class EngineFailed(Exception):
    """The engine has broken down; no request is answered any more."""


class RequestHandle:
    """Requests that were submitted together, and the queue of their outputs."""

    def __init__(self, requests: Sequence[Request]):
        self.requests = requests
        self.unfinished = 0  # answers
        self.live = True  # there is work for the engine
        self.outputs: asyncio.Queue[Output | Exception | None] = asyncio.Queue()

    async def next(self) -> Output | None:
        """Returns None once the engine has accepted the requests, then their outputs one by one.
        Raises RequestError where it refuses them, EngineFailed where it broke, and whatever else
        went wrong as it took them."""
        if isinstance(item := await self.outputs.get(), Exception):
            raise item
        return item


class EngineThread:
    """Runs an engine's steps in a thread as long as there is work. Only `_run` and what it calls
    runs in that thread; all else belongs to the event loop's thread."""

    def __init__(self, engine: Any, on_failure: Callable[[BaseException], None]):
        """`on_failure` is called, in the engine's thread, with the error that broke the engine."""
        self.engine, self._on_failure = engine, on_failure
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._handles: dict[str, RequestHandle] = {}
        self._thread = threading.Thread(target=self._run, name="grok-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.failed = False
        self.step_began: float | None = None  # by the monotonic clock; None between steps
        self.live = 0  # handles with work for the engine, whether or not a client reads the rest

    def start(self) -> None:
        """Begins; called in the event loop that will submit."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its present step."""
        self._inbox.put(None)
        self._thread.join()

    @contextlib.asynccontextmanager
    async def submit(self, requests: Sequence[Request]) -> AsyncIterator[RequestHandle]:
        """Submits requests to the engine; those unfinished at the exit are cancelled."""
        if self.failed:
            raise EngineFailed
        handle = RequestHandle(requests)
        self.live += 1
        self._inbox.put(lambda: self._submit(handle))
        try:
            yield handle
        finally:
            self._retire(handle)
            self._inbox.put(lambda: self._cancel(handle))

    def _retire(self, handle: RequestHandle) -> None:
        self.live -= handle.live
        handle.live = False

    # ---- in the engine's thread

    def _run(self) -> None:
        try:
            while self._drain_inbox():
                if self.engine.unfinished:
                    self.step_began = time.monotonic()
                    outputs = self.engine.step()
                    self.step_began = None
                    self._deliver(outputs)
        except BaseException as error:
            self.failed, self.step_began = True, None
            self._send([(handle, EngineFailed()) for handle in set(self._handles.values())])
            self._on_failure(error)
            while (action := self._inbox.get()) is not None:
                action()

    def _drain_inbox(self) -> bool:
        """Runs what is queued, waiting for it while the engine is idle; False to stop."""
        while not self._inbox.empty() or not self.engine.unfinished:
            if (action := self._inbox.get()) is None:
                return False
            action()
        return True

    def _submit(self, handle: RequestHandle) -> None:
        try:
            if self.failed:
                raise EngineFailed
            submit_all(self.engine, handle.requests)
        except Exception as error:  # of these requests alone
            self._send([(handle, error)])
            return
        for request in handle.requests:
            self._handles[request.id] = handle
            handle.unfinished += request.params.n
        self._send([(handle, None)])

    def _cancel(self, handle: RequestHandle) -> None:
        for request in handle.requests:
            if self._handles.pop(request.id, None) is not None and not self.failed:
                self.engine.cancel(request.id)

    def _deliver(self, outputs: Sequence[Output]) -> None:
        items = []
        for output in outputs:
            if (handle := self._handles.get(output.request_id)) is None:
                continue  # its client has disconnected
            if output.finish_reason:
                handle.unfinished -= 1
                if handle.unfinished == 0:
                    for request in handle.requests:
                        self._handles.pop(request.id, None)
            items.append((handle, output))
        self._send(items)

    def _send(self, items: Sequence[tuple[RequestHandle, Output | Exception | None]]) -> None:
        """Puts each item into its queue; all at once, as each waking of the loop takes time from
        the devices."""
        finished = {handle for handle, item in items if item and not handle.unfinished}

        def put() -> None:
            for handle, item in items:
                handle.outputs.put_nowait(item)
            for handle in finished:
                self._retire(handle)

        assert self._loop is not None
        # The loop is closed where the server has stopped in the meantime.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(put)


BUCKET_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counts and latencies of requests; the engine's counts are read at each scrape."""

    def __init__(self, engine_thread: EngineThread):
        self._source, self._registry = engine_thread, CollectorRegistry()
        self._registry.register(self)
        registry, labels = self._registry, ("path", "code")
        self.requests = Counter("grok_requests", "requests answered", labels, registry=registry)

        def seconds(name: str, meaning: str) -> Histogram:
            return Histogram(name, meaning, registry=registry, buckets=BUCKET_SECONDS)

        first_token = "from a request to its first token"
        self.first_token = seconds("grok_time_to_first_token_seconds", first_token)
        self.duration = seconds("grok_request_seconds", "from a request to the end of its answer")

    def collect(self) -> Iterator[Metric]:
        """The engine's counts, for the registry."""
        stats = self._source.engine.stats  # as of its last step
        for field in dataclasses.fields(stats):
            family = CounterMetricFamily if field.metadata["total"] else GaugeMetricFamily
            value = getattr(stats, field.name)
            yield family(f"grok_{field.name}", field.metadata["meaning"], value)
        yield GaugeMetricFamily("grok_requests_live", "requests under way", self._source.live)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
