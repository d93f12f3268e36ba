"""Several hosts: one process on each, started by the same command, that start and end together.

TPU VMs find each other by their metadata. Elsewhere the environment has GROK_COORDINATOR (host:port
of process 0, free there), GROK_NUM_PROCESSES and GROK_PROCESS_ID (from 0). A process that fails
publishes the reason in the coordination service's store, and all exit with its code; the service
aborts them when one was killed or no longer answers."""

import contextlib
import functools
import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import jax

# JAX's key-value store has no public name; Orbax uses it likewise.
from jax._src.distributed import global_state

from grok import rendezvous
from grok.cluster import INITIALIZE_TIMEOUT_SECONDS, env_cluster, tpu_cluster
from grok.config.load import flatten, to_dict
from grok.errors import RESTART, ConfigError, GrokError, Lost
from grok.locks import folder as locks

SHUTDOWN_TIMEOUT_SECONDS = 10
FOREVER_MS = 7 * 24 * 3600 * 1000

_ABORT_KEY = "grok/abort"
_call_numbers = itertools.count()
_aborting = threading.Lock()
_tried = threading.Event()  # to connect


def process_index() -> int:
    """Index of this process; process 0 is the primary, which writes files and prints for all."""
    return global_state.process_id


def process_count() -> int:
    """Number of processes of the run."""
    return global_state.num_processes or 1


def is_primary() -> bool:
    """True in process 0, which writes files and prints for all."""
    return process_index() == 0


def coordinator_host() -> str:
    """Host of process 0, as the other processes reach it."""
    address = global_state.coordinator_address
    assert address, "initialize connects first"
    return address.rpartition(":")[0].strip("[]")


@contextlib.contextmanager
def exit_together() -> Iterator[None]:
    """Ends all processes when the body fails in one of them, with the exit code of its error. The
    body may call `initialize`. In a process that works alone, errors pass unchanged."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(GrokError):
            # Where connecting is what failed, the others know why or wait for no one.
            if not _tried.is_set():
                _connect(heartbeat_timeout_seconds=INITIALIZE_TIMEOUT_SECONDS)
        if not _is_connected():
            raise
        _abort_on(error)
    if _is_connected():
        jax.distributed.shutdown()


def initialize(config: Any, heartbeat_timeout_seconds: int = 60) -> None:
    """Waits for the other processes, if there are any, and checks that all have the same config (a
    dataclass with a mesh). A process silent for `heartbeat_timeout_seconds` ends the others. Raises
    ConfigError where the environment or another process's config makes that impossible, and Lost
    (exit code RESTART) when the others do not come."""
    _connect(heartbeat_timeout_seconds)
    settings = dict(flatten(to_dict(config)))
    primary_settings = broadcast_from_primary(lambda: settings)
    for key, value in settings.items():
        if json.loads(json.dumps(value)) != primary_settings.get(key):
            raise ConfigError(
                f"{key} is {value} here and {primary_settings.get(key)} in process 0; the same "
                "command and the same files on every host would work."
            )
    if config.mesh.simulated_devices % process_count():
        raise ConfigError(
            f"mesh.simulated_devices={config.mesh.simulated_devices} cannot be shared by "
            f"{process_count()} processes; mesh.simulated_devices={process_count()} would work."
        )


def broadcast_from_primary(make: Callable[[], Any]) -> Any:
    """Returns, in every process, what `make()`, plain data, is in process 0. A collective."""
    if process_count() == 1:
        return make()
    key = f"grok/broadcast/{next(_call_numbers)}"
    if is_primary():
        value = make()
        _store().key_value_set(key, json.dumps(value))
        return value
    # However long it takes: if process 0 fails, that ends this process too.
    return json.loads(_store().blocking_key_value_get(key, FOREVER_MS))


def first_of_any(value: Any) -> Any:
    """Returns, in every process, the `value`, plain data, of the first process where it is not
    None. A collective."""
    if process_count() == 1:
        return value
    key = f"grok/values/{next(_call_numbers)}"
    _store().key_value_set(f"{key}/{process_index()}", json.dumps(value))

    def first() -> Any:
        keys = (f"{key}/{process}" for process in range(process_count()))
        values = (json.loads(_store().blocking_key_value_get(k, FOREVER_MS)) for k in keys)
        return next((value for value in values if value is not None), None)

    return broadcast_from_primary(first)


def all_gather(value: Any) -> list[Any]:
    """Returns, in every process, the `value`, plain data, of each process. A collective."""
    if process_count() == 1:
        return [value]
    prefix = f"grok/gather/{next(_call_numbers)}"
    _store().key_value_set(f"{prefix}/{process_index()}", json.dumps(value))
    keys = (f"{prefix}/{index}" for index in range(process_count()))
    return [json.loads(_store().blocking_key_value_get(key, FOREVER_MS)) for key in keys]


def host_name() -> str:
    """Name of this machine."""
    return socket.gethostname()


def compile_in_lockstep(jitted: Any, *arguments: Any) -> None:
    """Compiles in every process before any runs: CPU collectives time out after half a minute."""
    jitted.lower(*arguments).compile()
    barrier()


def barrier() -> None:
    """Waits, however long, until every process has called it."""
    if process_count() > 1:
        _store().wait_at_barrier(f"grok/barrier/{next(_call_numbers)}", FOREVER_MS)


def abort(code: int, reason: str, lost: int | None = None) -> NoReturn:
    """Ends every process at once with exit code `code`, from any thread, and prints `reason`. The
    process `lost` is not waited for; without process 0, which holds the store, the others are not
    told."""
    if not _aborting.acquire(blocking=False):
        threading.Event().wait()  # another thread of this process is aborting already
    if not _is_connected():
        _print_error(f"error: {reason}")
        os._exit(code)
    _print_error(f"[process {process_index()}] error: {reason}")
    if lost == 0:
        os._exit(code)
    message = json.dumps({"process": process_index(), "code": code, "reason": reason})
    _exit(code, message, lost)


def hold_folder(folder: str, share: tuple[int, int] = (0, 1)) -> AbstractContextManager[None]:
    """Holds the lock of a job's folder for this process, or that of a share of it. Where another
    process takes it over, all processes of this job end with exit code RESTART."""
    return locks.hold_folder(folder, share=share, on_lost=functools.partial(abort, RESTART))


def lost_contact(error: BaseException) -> Lost | None:
    """The error to raise instead of one by which a collective says that another process is gone;
    None for any other error."""
    if isinstance(error, jax.errors.JaxRuntimeError) and "Gloo" in str(error):
        return Lost(f"lost contact with another process: {str(error).splitlines()[0]}")
    return None


def _is_connected() -> bool:
    return global_state.client is not None


def _store() -> Any:
    return global_state.client


def _connect(heartbeat_timeout_seconds: int) -> None:
    """Connects to the other processes, if there are any, and starts to listen for an abort."""
    _tried.set()
    cluster = env_cluster() or tpu_cluster()
    if cluster is None:
        return
    # Its signal handler would take SIGTERM away from Python's.
    jax.config.update("jax_enable_preemption_service", False)
    rendezvous.meet(*cluster, INITIALIZE_TIMEOUT_SECONDS)
    try:
        jax.distributed.initialize(
            *cluster,
            cluster_detection_method="deactivate",
            initialization_timeout=INITIALIZE_TIMEOUT_SECONDS,
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
        )
    except jax.errors.JaxRuntimeError as error:
        raise Lost(
            f"not all processes of the run connected within {INITIALIZE_TIMEOUT_SECONDS} s: "
            f"{str(error).splitlines()[0]}"
        ) from error
    threading.Thread(target=_listen_for_abort, daemon=True).start()


def _listen_for_abort() -> None:
    while _is_connected():
        message = _read(_ABORT_KEY)
        if message is not None and _aborting.acquire(blocking=False):
            published = json.loads(message)
            sender, reason = published["process"], published["reason"]
            _print_error(f"[process {process_index()}] ended by process {sender}: {reason}")
            _exit(published["code"])
        time.sleep(1)


def _read(key: str) -> str | None:
    with contextlib.suppress(jax.errors.JaxRuntimeError, AttributeError):
        return _store().key_value_try_get(key)
    return None


def _abort_on(error: BaseException) -> NoReturn:
    if isinstance(error, GrokError | OSError):
        abort(getattr(error, "exit_code", 1), str(error))
    if isinstance(error, KeyboardInterrupt):
        abort(130, "interrupted")
    if lost := lost_contact(error):
        abort(RESTART, str(lost))
    traceback.print_exception(error)
    abort(1, f"{type(error).__name__}: {error}")


def _print_error(line: str) -> None:
    """Prints a last line, if that is possible: the log may lie on the disk that is full."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _exit(code: int, message: str | None = None, lost: int | None = None) -> NoReturn:
    """Exits without JAX's shutdown barrier, after publishing the abort `message` if there is one.
    The store may not answer any more, so a thread publishes, for a limited time."""
    publisher = threading.Thread(target=_publish_abort, args=[message, lost], daemon=True)
    publisher.start()
    publisher.join(SHUTDOWN_TIMEOUT_SECONDS)
    os._exit(code)


def _publish_abort(message: str | None, lost: int | None) -> None:
    """Publishes the abort, or acknowledges one; process 0, which holds the store, waits for all but
    the `lost` one."""
    for key, value in ((_ABORT_KEY, message), (f"{_ABORT_KEY}/read/{process_index()}", "")):
        # Where another process aborted first, its reason stays.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            if value is not None:
                _store().key_value_set(key, value)
    waiting_for = set(range(1, process_count())) - {lost} if is_primary() else set()
    while waiting_for := {i for i in waiting_for if _read(f"{_ABORT_KEY}/read/{i}") is None}:
        time.sleep(0.1)
