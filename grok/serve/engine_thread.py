"""The engine in a thread of its own, asked from the event loop over a queue."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from grok.infer.request import Output, Request, RequestError


class EngineFailed(Exception):
    """The engine has broken down; nothing more is answered."""


class Flight:
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


class Worker:
    """Runs an engine's steps as long as there is something to do, in a thread.

    Everything but `_run` and what it calls belongs to the event loop's thread.
    """

    def __init__(self, engine: Any, on_failure: Callable[[BaseException], None]):
        """`on_failure` is told, in the worker's thread, what broke the engine."""
        self._engine, self._on_failure = engine, on_failure
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._flights: dict[str, Flight] = {}
        self._thread = threading.Thread(target=self._run, name="grok-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.failed = False
        self.live = 0  # flights that are not over

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
    async def flying(self, requests: Sequence[Request]) -> AsyncIterator[Flight]:
        """Hands requests to the engine; those that have not ended at the exit are cancelled."""
        if self.failed:
            raise EngineFailed
        flight = Flight(requests)
        self.live += 1
        self._inbox.put(lambda: self._submit(flight))
        try:
            yield flight
        finally:
            self.live -= 1
            self._inbox.put(lambda: self._cancel(flight))

    # ---- in the thread

    def _run(self) -> None:
        try:
            while self._take_orders():
                if self._engine.unfinished:
                    for output in self._engine.step():
                        self._deliver(output)
        except BaseException as error:
            self.failed = True
            for flight in set(self._flights.values()):
                self._send(flight, EngineFailed())
            self._on_failure(error)
            while (order := self._inbox.get()) is not None:
                order()  # each of which is told the same

    def _take_orders(self) -> bool:
        """Does what was asked; waits for it where there is nothing else to do. False: stop."""
        while not self._inbox.empty() or not self._engine.unfinished:
            order = self._inbox.get()
            if order is None:
                return False
            order()
        return True

    def _submit(self, flight: Flight) -> None:
        if self.failed:
            self._send(flight, EngineFailed())
            return
        taken = []
        try:
            for request in flight.requests:
                self._engine.submit(request)
                taken.append(request.id)
                self._flights[request.id] = flight
                flight.left += request.params.n
        except RequestError as error:
            for request_id in taken:
                self._engine.cancel(request_id)
                del self._flights[request_id]
            self._send(flight, error)
            return
        self._send(flight, None)

    def _cancel(self, flight: Flight) -> None:
        for request in flight.requests:
            if self._flights.pop(request.id, None) is not None and not self.failed:
                self._engine.cancel(request.id)

    def _deliver(self, output: Output) -> None:
        flight = self._flights.get(output.request_id)
        if flight is None:
            return  # its client has left
        if output.finish_reason:
            flight.left -= 1
            if flight.left == 0:
                for request in flight.requests:
                    self._flights.pop(request.id, None)
        self._send(flight, output)

    def _send(self, flight: Flight, item: Output | Exception | None) -> None:
        assert self._loop is not None
        # The loop is closed where the server has stopped in the meantime.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(flight.arrived.put_nowait, item)
