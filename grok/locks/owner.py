"""The process that holds a lock, as its file names it, and whether that is still there."""

import contextlib
import dataclasses
import datetime
import getpass
import json
import os
import secrets
import socket
from pathlib import Path
from typing import Self


@dataclasses.dataclass(frozen=True)
class Owner:
    """A process that holds a lock. `machine` tells kernels and containers apart, `started` two
    processes of one number, and `token` two locks of one process; all are empty where not known."""

    host: str = ""
    pid: int = 0
    user: str = ""
    since: str = ""
    machine: str = ""
    started: str = ""
    token: str = ""

    @classmethod
    def this_process(cls) -> Self:
        """The owner of a lock that this process is about to take."""
        now = datetime.datetime.now(datetime.UTC)
        user = str(os.getuid())
        with contextlib.suppress(KeyError, OSError):  # a container has no name for its user
            user = getpass.getuser()
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            user=user,
            since=f"{now:%Y-%m-%d %H:%M:%S} UTC",
            machine=_machine(),
            started=_started(os.getpid()) or "",
            token=secrets.token_hex(8),
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The owner that a lock's file names; an unknown one where it names none."""
        try:
            record = json.loads(data)
            return cls(**{field.name: record[field.name] for field in dataclasses.fields(cls)})
        except (ValueError, KeyError, TypeError):
            return cls()

    def to_bytes(self) -> bytes:
        """The content of a lock's file."""
        return json.dumps(dataclasses.asdict(self), indent=1).encode() + b"\n"

    @property
    def is_dead(self) -> bool:
        """True where this machine has no such process any more; False on any other machine."""
        here = bool(self.machine) and self.machine == _machine()
        return here and _started(self.pid) != self.started

    @property
    def lives_here(self) -> bool:
        """True where it is a process of this machine that has not ended."""
        return bool(self.machine) and self.machine == _machine() and not self.is_dead

    def __str__(self) -> str:
        if not self.pid:
            return "it does not say which"
        return f"process {self.pid} on {self.host}, of user {self.user}, since {self.since}"


def _machine() -> str:
    """Identity of this machine since its start, and of the container; empty where not known."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _started(pid: int) -> str | None:
    """The time at which a process of this machine began, in ticks; None where there is none."""
    with contextlib.suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # A process that ended, and whose parent has not looked yet, does nothing any more.
        return None if state in "ZX" else fields[18]
    return None
