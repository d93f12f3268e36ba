"""Several hosts: one process on each, started by the same command, that begin and end together.

On TPU VMs the processes find each other through the VM's metadata. Elsewhere each is given, in its
environment, GROK_COORDINATOR (host:port of process 0, free there), GROK_NUM_PROCESSES and
GROK_PROCESS_ID (from 0); without them a process works alone.

A process that fails tells the others why, and all leave with its exit code. One that is killed, or
stops answering, is missed by JAX's coordination service, which then aborts the others.
"""

import contextlib
import functools
import itertools
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax

# JAX's store of keys and values that all processes see has no public name; Orbax uses it likewise.
from jax._src import distributed

from grok.config.load import flatten, to_dict
from grok.devices import has_tpu
from grok.errors import RESTART, ConfigError, GrokError, Lost

VARIABLES = ("GROK_COORDINATOR", "GROK_NUM_PROCESSES", "GROK_PROCESS_ID")
JOIN_SECONDS = 300
GOODBYE_SECONDS = 10
FOREVER_SECONDS = 7 * 24 * 3600

_END = "grok/end"
_agreements = itertools.count()
_leaving = threading.Lock()


def number() -> int:
    """Which process this is; 0 is the one that writes and speaks for all."""
    return distributed.global_state.process_id


def count() -> int:
    """How many processes the run has."""
    return distributed.global_state.num_processes or 1


def is_first() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return number() == 0


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """What runs inside may `join` others; an error in one process then ends all of them, with the
    exit code of that error. Alone, errors pass as they are."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(GrokError):
            if not _joined():
                _connect(heartbeat_timeout_seconds=JOIN_SECONDS)
        if not _joined():
            raise
        _fail(error)
    if _joined():
        jax.distributed.shutdown()


def join(config: Any, heartbeat_timeout_seconds: int = 60) -> None:
    """Waits for the other processes, where there are some, and checks that all have this config
    (a dataclass with a mesh). One that is silent for `heartbeat_timeout_seconds` ends the others.

    Raises ConfigError where the environment or another config makes that impossible, and
    GrokError with code RESTART when the others do not come.
    """
    _connect(heartbeat_timeout_seconds)
    ours = dict(flatten(to_dict(config)))
    theirs = from_first(lambda: ours)
    for key, value in ours.items():
        if json.loads(json.dumps(value)) != theirs.get(key):
            raise ConfigError(
                f"{key} is {value} here and {theirs.get(key)} in process 0; the same command and "
                "the same files on every host would work."
            )
    if config.mesh.simulated_devices % count():
        raise ConfigError(
            f"mesh.simulated_devices={config.mesh.simulated_devices} cannot be shared by {count()} "
            f"processes; mesh.simulated_devices={count()} would work."
        )


def from_first(make: Callable[[], Any]) -> Any:
    """What `make` returns in process 0, in every process; plain data, asked for by all."""
    if count() == 1:
        return make()
    key = f"grok/agreement/{next(_agreements)}"
    if is_first():
        value = make()
        _store().key_value_set(key, json.dumps(value))
        return value
    # However long it takes: should process 0 fail, that ends this process too.
    return json.loads(_store().blocking_key_value_get(key, FOREVER_SECONDS * 1000))


def compile_together(function: Any, *arguments: Any) -> None:
    """Compiles what `function`, of jax.jit, will run on `arguments`, in every process before any
    runs it: a CPU waits half a minute for another in its first exchange, and no longer."""
    function.lower(*arguments).compile()
    meet()


def meet() -> None:
    """Waits, however long, until every process has come here."""
    if count() > 1:
        _store().wait_at_barrier(f"grok/meeting/{next(_agreements)}", FOREVER_SECONDS * 1000)


def leave(code: int, sentence: str) -> NoReturn:
    """Ends every process at once with exit code `code`, from any thread; `sentence` says why."""
    if not _leaving.acquire(blocking=False):
        threading.Event().wait()  # another thread of this process is ending it already
    if not _joined():
        _say(f"error: {sentence}")
        os._exit(code)
    _say(f"[process {number()}] error: {sentence}")
    word = {"process": number(), "code": code, "sentence": sentence}
    _go(code, json.dumps(word))


def _say(sentence: str) -> None:
    """A last word, where it can be said: the log may lie on the disk that is full."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        print(sentence, file=sys.stderr, flush=True)


def place() -> tuple[str, int, int] | None:
    """Coordinator, number of processes and own number, from the environment; None without."""
    values = [os.environ.get(name, "") for name in VARIABLES]
    if not any(values):
        return None
    address, processes, own = values
    if not all(values):
        missing = ", ".join(name for name in VARIABLES if not os.environ.get(name))
        raise ConfigError(
            f"the environment has only some of {', '.join(VARIABLES)}; with {missing} as well, or "
            "with none of them, it would work."
        )
    if not (processes.isdecimal() and own.isdecimal() and int(own) < int(processes)):
        raise ConfigError(
            f"GROK_NUM_PROCESSES={processes} and GROK_PROCESS_ID={own} are no number of "
            "processes and one of them counted from 0; 2 and 0, and 2 and 1 on the other host, "
            "would work."
        )
    if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdecimal():
        raise ConfigError(f"GROK_COORDINATOR={address} is no address; 10.0.0.1:8476 would work.")
    return address, int(processes), int(own)


def _joined() -> bool:
    return distributed.global_state.client is not None


def _store() -> Any:
    """The keys and values that all processes see."""
    return distributed.global_state.client


def _connect(heartbeat_timeout_seconds: int) -> None:
    """Joins the other processes, where there are some, and from then on listens for one that
    ends the run."""
    own = place()
    if not own and not has_tpu():
        return
    # Its signal handler would take SIGTERM away from Python's.
    jax.config.update("jax_enable_preemption_service", False)
    initialize = functools.partial(
        jax.distributed.initialize,
        initialization_timeout=JOIN_SECONDS,
        heartbeat_timeout_seconds=heartbeat_timeout_seconds,
    )
    try:
        if own:
            initialize(*own, cluster_detection_method="deactivate")
        else:
            initialize()
    except ValueError:
        if own:
            raise
        return  # a TPU that is part of no cluster
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise Lost(
            f"not all processes of the run came within {JOIN_SECONDS} s: {reason}"
        ) from error
    threading.Thread(target=_listen, daemon=True).start()


def _listen() -> None:
    """Ends this process when another has ended the run."""
    while _joined():
        word = _read(_END)
        if word is not None and _leaving.acquire(blocking=False):
            word = json.loads(word)
            _say(f"[process {number()}] ended by process {word['process']}: {word['sentence']}")
            _go(word["code"])
        time.sleep(1)


def _read(key: str) -> str | None:
    """A value of the common store, None where there is none (or no store any more)."""
    with contextlib.suppress(jax.errors.JaxRuntimeError, AttributeError):
        return _store().key_value_try_get(key)
    return None


def _fail(error: BaseException) -> NoReturn:
    """Ends every process because of `error`."""
    if isinstance(error, GrokError):
        leave(error.exit_code, str(error))
    if isinstance(error, OSError):
        leave(1, str(error))
    if isinstance(error, KeyboardInterrupt):
        leave(130, "interrupted")
    if isinstance(error, jax.errors.JaxRuntimeError) and "Gloo" in str(error):
        reason = str(error).splitlines()[0]
        leave(RESTART, f"lost contact with another process: {reason}")
    traceback.print_exception(error)
    leave(1, f"{type(error).__name__}: {error}")


def _go(code: int, word: str | None = None) -> NoReturn:
    """Leaves without the goodbye that JAX would wait for, having told the others `word`."""
    # Nobody may answer, so that is done in a thread, and left alone after a while.
    goodbye = threading.Thread(target=_say_goodbye, args=[word], daemon=True)
    goodbye.start()
    goodbye.join(GOODBYE_SECONDS)
    os._exit(code)


def _say_goodbye(word: str | None) -> None:
    """Process 0 keeps the store, so it waits until the others have read why all leave."""
    for key, value in ((_END, word), (f"{_END}/read/{number()}", "")):
        # Where another process was first, its reason stays.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            if value is not None:
                _store().key_value_set(key, value)
    others = set(range(1, count())) if is_first() else set()
    while others := {each for each in others if _read(f"{_END}/read/{each}") is None}:
        time.sleep(0.1)
