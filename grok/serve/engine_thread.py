"""The engine in a thread of its own, asked from the event loop over a queue."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from grok.errors import RequestError
from grok.infer.request import Output, Request


class EngineFailed(Exception):
    """The engine has broken down; nothing more is answered."""


class RequestHandle:
    """Requests that were handed over together, and what came back of them."""

    def __init__(self, requests: Sequence[Request]):
        self.requests = requests
        self.left = 0  # answers that have not ended
        self.arrived: asyncio.Queue[Output | Exception | None] = asyncio.Queue()

    async def next(self) -> Output | None:
        """What comes next: None once the engine has taken the requests, then their outputs.
        Raises RequestError where it refuses them, EngineFailed where it broke."""
        item = await self.arrived.get()
        if isinstance(item, Exception):
            raise item
        return item


class EngineThread:
    """Runs an engine's steps as long as there is something to do, in a thread.

    Everything but `_run` and what it calls belongs to the event loop's thread.
    """

    def __init__(self, engine: Any, on_failure: Callable[[BaseException], None]):
        """`on_failure` is told, in the engine_thread's thread, what broke the engine."""
        self._engine, self._on_failure = engine, on_failure
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._handles: dict[str, RequestHandle] = {}
        self._thread = threading.Thread(target=self._run, name="grok-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.failed = False
        self.live = 0  # requests that are not over

    def start(self) -> None:
        """Begins; called in the event loop that will ask."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its present step."""
        self._inbox.put(None)
        self._thread.join()

    @property
    def stats(self) -> Any:
        """The engine's counts, as of its last step."""
        return self._engine.stats

    @contextlib.asynccontextmanager
    async def submit(self, requests: Sequence[Request]) -> AsyncIterator[RequestHandle]:
        """Hands requests to the engine; those that have not ended at the exit are cancelled."""
        if self.failed:
            raise EngineFailed
        handle = RequestHandle(requests)
        self.live += 1
        self._inbox.put(lambda: self._submit_all(handle))
        try:
            yield handle
        finally:
            self.live -= 1
            self._inbox.put(lambda: self._cancel(handle))

    # ---- in the thread

    def _run(self) -> None:
        try:
            while self._drain_inbox():
                if self._engine.unfinished:
                    for output in self._engine.step():
                        self._deliver(output)
        except BaseException as error:
            self.failed = True
            for handle in set(self._handles.values()):
                self._send(handle, EngineFailed())
            self._on_failure(error)
            while (order := self._inbox.get()) is not None:
                order()  # each of which is told the same

    def _drain_inbox(self) -> bool:
        """Does what was asked; waits for it where there is nothing else to do. False: stop."""
        while not self._inbox.empty() or not self._engine.unfinished:
            order = self._inbox.get()
            if order is None:
                return False
            order()
        return True

    def _submit_all(self, handle: RequestHandle) -> None:
        if self.failed:
            self._send(handle, EngineFailed())
            return
        taken = []
        try:
            for request in handle.requests:
                self._engine.submit(request)
                taken.append(request.id)
                self._handles[request.id] = handle
                handle.left += request.params.n
        except RequestError as error:
            for request_id in taken:
                self._engine.cancel(request_id)
                del self._handles[request_id]
            self._send(handle, error)
            return
        self._send(handle, None)

    def _cancel(self, handle: RequestHandle) -> None:
        for request in handle.requests:
            if self._handles.pop(request.id, None) is not None and not self.failed:
                self._engine.cancel(request.id)

    def _deliver(self, output: Output) -> None:
        handle = self._handles.get(output.request_id)
        if handle is None:
            return  # its client has left
        if output.finish_reason:
            handle.left -= 1
            if handle.left == 0:
                for request in handle.requests:
                    self._handles.pop(request.id, None)
        self._send(handle, output)

    def _send(self, handle: RequestHandle, item: Output | Exception | None) -> None:
        assert self._loop is not None
        # The loop is closed where the server has stopped in the meantime.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(handle.arrived.put_nowait, item)
