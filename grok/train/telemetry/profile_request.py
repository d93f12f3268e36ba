"""Profiles that a person asks a job for while it trains, by a file in the run's folder. The job
answers with another, when the profile is written."""

import contextlib
import dataclasses
import json
import secrets
import time
from typing import Any

from grok import storage
from grok.errors import GrokError
from grok.locks.folder import find_owner
from grok.storage import StrPath, join

REQUEST_FILE, ANSWER_FILE = "profile-request.json", "profile-answer.json"
SECONDS = 1.0  # between two looks for an answer


@dataclasses.dataclass(frozen=True)
class Request:
    """The number of steps to profile, and a token that the answer repeats."""

    steps: int
    token: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """The first and last step that were profiled."""

    first: int
    last: int


def request_profile(folder: str, steps: int) -> Answer:
    """Asks the job that trains in `folder` for a profile of its next steps, and waits for it.
    Raises GrokError where none trains there, or it ends before."""
    request, file = Request(steps, secrets.token_hex(8)), join(folder, REQUEST_FILE)
    if find_owner(folder) is None:
        right = (
            "`grok train` there, with train.profile=[FIRST, LAST], profiles steps of a new start"
        )
        raise GrokError(f"{folder}: nothing is training here now; {right}.")
    with storage.errors(folder, GrokError, "cannot be written"):
        storage.write_bytes(file, json.dumps(dataclasses.asdict(request)).encode())
    try:
        while (answer := _read(folder, ANSWER_FILE)).get("token") != request.token:
            if find_owner(folder) is None:
                raise GrokError(f"{folder}: the job ended before its profile was written.")
            time.sleep(SECONDS)
    finally:
        with contextlib.suppress(FileNotFoundError):  # the job removes it when it takes it
            storage.remove(file)
    storage.remove(join(folder, ANSWER_FILE))
    return Answer(answer["first"], answer["last"])


def take_request(folder: StrPath) -> Request | None:
    """The request in a run's folder, which is removed; None without a right one."""
    data = _read(folder, REQUEST_FILE)
    if data:
        storage.remove(join(folder, REQUEST_FILE))
    match data:
        case {"steps": int(steps), "token": str(token)} if steps > 0:
            return Request(steps, token)
    return None


def answer_request(folder: StrPath, request: Request, first: int, last: int) -> None:
    """Tells who asked that the steps were profiled. Raises OSError."""
    answer = {"token": request.token, "first": first, "last": last}
    storage.write_bytes(join(folder, ANSWER_FILE), json.dumps(answer).encode())


def _read(folder: StrPath, name: str) -> dict[str, Any]:
    """The object in a file, {} where there is none."""
    try:
        data = json.loads(storage.read_bytes(join(folder, name)))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
