"""One server of several processes: process 0 speaks HTTP, and the others repeat its engine's calls.

A mesh that spans hosts runs a program when every one of its processes dispatches it. The engine's
state depends on its calls alone, so process 0 sends its calls before each step, and all processes
hold the same state and run the same step."""

import os
import signal
import zlib
from collections.abc import Iterable
from types import FrameType
from typing import Any

from grok import distributed
from grok.config.infer import ServeConfig
from grok.config.sampling import SamplingParams
from grok.errors import RESTART, Lost
from grok.infer.request import Output, Request
from grok.infer.stats import EngineStats
from grok.serve.channel import FollowerChannel, PrimaryChannel


def open_channel(config: ServeConfig) -> PrimaryChannel | FollowerChannel:
    """This process's side of the channel; a collective. From here on a process that is lost ends
    all of them with RESTART. Raises Lost."""
    timeout = config.heartbeat_timeout_seconds

    def on_lost(index: int, reason: str) -> None:
        distributed.abort(RESTART, reason, lost=index)

    primary = None
    if distributed.is_primary():
        primary = PrimaryChannel(distributed.process_count() - 1, timeout, on_lost)
    port, token = distributed.broadcast_from_primary(
        lambda: (primary.port, primary.token) if primary else None
    )
    if primary is None:
        address = distributed.coordinator_host(), port
        index = distributed.process_index()
        return FollowerChannel(address, index, token, timeout, on_lost)
    primary.accept(distributed.INITIALIZE_TIMEOUT_SECONDS)
    return primary


class OutputChecksum:
    """Checksum of all outputs so far, by which processes find that their engines differ."""

    def __init__(self) -> None:
        self.value = 0

    def update(self, outputs: Iterable[Output]) -> None:
        """Adds the outputs of a step."""
        for output in outputs:
            key = (output.request_id, output.choice, output.token_ids, output.finish_reason)
            self.value = zlib.crc32(repr(key).encode(), self.value)


class ReplicatedEngine:
    """Process 0's engine, with the interface of an engine: its calls reach the others first."""

    def __init__(self, engine: Any, channel: PrimaryChannel):
        self._engine, self._channel = engine, channel
        self._calls: list[tuple[str, Any]] = []
        self._checksum = OutputChecksum()

    @property
    def unfinished(self) -> int:
        """Completions whose last Output is still to come."""
        return self._engine.unfinished

    @property
    def stats(self) -> EngineStats:
        """The engine's counts."""
        return self._engine.stats

    def submit(self, request: Request) -> None:
        """Queues a request. Raises RequestError where it could never be run."""
        self._engine.submit(request)
        plain = {"id": request.id, "prompt": request.prompt, "params": vars(request.params)}
        self._calls.append(("submit", plain))

    def cancel(self, request_id: str) -> None:
        """Ends a request; unknown ids are ignored."""
        self._engine.cancel(request_id)
        self._calls.append(("cancel", request_id))

    def step(self) -> list[Output]:
        """Runs one step in every process, and returns what is new."""
        self._channel.send({"calls": self._calls, "checksum": self._checksum.value})
        self._calls = []
        outputs = self._engine.step()
        self._checksum.update(outputs)
        return outputs


def follow(engine: Any, channel: FollowerChannel) -> None:
    """Repeats process 0's calls until it stops. A signal to this process asks process 0 to stop; a
    second one ends this process. Raises Lost where the engine's outputs differ from process 0's."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def on_signal(number: int, frame: FrameType | None) -> None:
        for caught in numbers:
            signal.signal(caught, signal.SIG_DFL)
        os.write(2, b"\nprocess 0 stops the server; once more stops at once\n")
        channel.request_stop()

    handlers = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        repeat_calls(engine, channel)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def repeat_calls(engine: Any, channel: FollowerChannel) -> None:
    """Makes the calls that arrive, step by step."""
    checksum = OutputChecksum()
    while (step := channel.receive()) is not None:
        if step["checksum"] != checksum.value:
            raise Lost("this process computed other tokens than process 0; all start again.")
        for name, argument in step["calls"]:
            if name == "submit":
                engine.submit(to_request(argument))
            else:
                engine.cancel(argument)
        checksum.update(engine.step())


def to_request(data: dict[str, Any]) -> Request:
    """The request of its plain data."""
    return Request(data["id"], tuple(data["prompt"]), SamplingParams(**data["params"]))
