"""Models on the Hugging Face hub by name, hf://ORG/NAME[@REVISION]: listed, fetched into the hub's
own cache, and uploaded, through `huggingface_hub` (its token, its progress, HF_ENDPOINT,
HF_HUB_OFFLINE). Weights, configs and tokenizers are fetched, never code nor pickles.

Each process asks for itself: hosts have caches of their own, and in the cache of one host the hub's
locks leave a file to one process while the others wait. Every failure is an OSError."""

import contextlib
import dataclasses
import fnmatch
import functools
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

SCHEME = "hf://"
# Nothing but these, and only beside config.json, not in folders of a repository.
SMALL_FILES = ("*.json", "tokenizer.model", "chat_template*.jinja")
FETCHED_FILES = ("*.safetensors", *SMALL_FILES)
ANY_FOLDER = "*/*"

REPO = r"hf://(?P<repo>\w[\w.-]*/\w[\w.-]*)"
NAME = re.compile(
    REPO + r"(@(?P<revision>refs/(pr|convert)/[\w.-]+|[^/@\s]+))?"
    r"(/(?P<file>.*))?"
)


@dataclasses.dataclass(frozen=True)
class HubPath:
    """A model's `repo` (ORG/NAME), its `revision`, and a file in it, empty for the model itself."""

    repo: str
    revision: str
    file: str


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A model at one commit: its local folder, and the sizes in bytes of its files there."""

    folder: str
    commit: str
    sizes: dict[str, int]


def is_hub(path: str | os.PathLike[str]) -> bool:
    """Returns True for a model's name on the hub, or a file of one."""
    return os.fspath(path).startswith(SCHEME)


def parse(path: str | os.PathLike[str]) -> HubPath:
    """The parts of a name. Raises OSError where it is none."""
    match = NAME.fullmatch(os.fspath(path))
    if match is None:
        raise OSError("it is no name on the hub; hf://ORG/NAME or hf://ORG/NAME@REVISION is one")
    return HubPath(match["repo"], match["revision"] or "main", (match["file"] or "").strip("/"))


def list_files(path: str | os.PathLike[str]) -> dict[str, int | None]:
    """Sizes in bytes of the files of a model by name, and None for each folder in it."""
    name = parse(path)
    if name.file:
        raise NotADirectoryError("Not a directory")
    files: dict[str, int | None] = {}
    for file, size in _snapshot(name.repo, name.revision).sizes.items():
        first, folder, _ = file.partition("/")
        files[first] = None if folder else size
    return files


def exists(path: str | os.PathLike[str]) -> bool:
    """Returns True where a model has this file, or is there itself."""
    name = parse(path)
    snapshot = _snapshot(name.repo, name.revision)
    return not name.file or name.file in snapshot.sizes


def fetch(path: str | os.PathLike[str]) -> str:
    """The local path of a model's file, which is downloaded unless the cache has it."""
    name = parse(path)
    return _fetch(name.repo, name.revision, name.file)


def download(path: str | os.PathLike[str], files: Iterable[str]) -> None:
    """Downloads files of the model `path` into the cache, several at a time."""
    name = parse(path)
    _download(name.repo, name.revision, tuple(files))


def pinned(path: str) -> str:
    """The name of a model with its present commit as revision; any other path as it is."""
    if not is_hub(path):
        return path
    name = parse(path)
    return f"{SCHEME}{name.repo}@{_snapshot(name.repo, name.revision).commit}"


def check_repo(repo: str) -> None:
    """Raises OSError unless `repo` is ORG/NAME."""
    if not re.fullmatch(REPO, f"{SCHEME}{repo}"):
        raise OSError("it is no name on the hub; ORG/NAME is one")


def upload(folder: str | os.PathLike[str], repo: str, public: bool) -> str:
    """Uploads a local folder's files to the model ORG/NAME, which is made, private unless `public`,
    where it is not there; returns its address. After an interruption the same call uploads what is
    missing."""
    from huggingface_hub import HfApi

    with _errors(repo, "main"):
        api = HfApi()
        address = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=os.fspath(folder), commit_message="Upload by grok export hf"
        )
    return str(address)


@functools.cache
def _snapshot(repo: str, revision: str) -> Snapshot:
    """Fetches a model's configs and tokenizer, and with them the list of all its files."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    with _errors(repo, revision):
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=list(SMALL_FILES), ignore_patterns=ANY_FOLDER
        )
    commit = os.path.basename(folder)
    try:
        tree = get_cached_repo_tree(repo, revision=commit)
    except CachedRepoTreeNotFoundError:
        # A cache filled by a program that leaves no lists, without the hub to ask.
        with os.scandir(folder) as entries:
            sizes = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        return Snapshot(folder, commit, sizes)
    return Snapshot(folder, commit, {file.path: file.size for file in tree})


@functools.cache
def _download(repo: str, revision: str, files: tuple[str, ...]) -> None:
    from huggingface_hub import snapshot_download

    commit = _snapshot(repo, revision).commit
    with _errors(repo, revision):
        snapshot_download(repo, revision=commit, allow_patterns=list(files))


@functools.cache
def _fetch(repo: str, revision: str, file: str) -> str:
    from huggingface_hub import hf_hub_download

    snapshot = _snapshot(repo, revision)
    if not file:
        return snapshot.folder
    if file not in snapshot.sizes:
        raise FileNotFoundError("No such file or directory")
    if "/" in file or not any(fnmatch.fnmatchcase(file, pattern) for pattern in FETCHED_FILES):
        raise OSError("only weights (*.safetensors), configs and tokenizers are fetched")
    with _errors(repo, revision):
        return hf_hub_download(repo, file, revision=snapshot.commit)


@contextlib.contextmanager
def _errors(repo: str, revision: str) -> Iterator[None]:
    """Turns the failures of the hub's client into an OSError that says what to do."""
    from huggingface_hub import constants, errors

    try:
        yield
    except (errors.HFValidationError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as e:
        raise OSError(_reason(e, repo, revision, constants.ENDPOINT)) from e
    except (OSError, ValueError):
        raise
    except Exception as error:
        # The HTTP client's own errors: timeouts, refused connections, names that do not resolve.
        cause = f" ({_line(error.__cause__)})" if error.__cause__ else ""
        raise OSError(f"{constants.ENDPOINT} does not answer: {_line(error)}{cause}") from error


def _reason(error: Any, repo: str, revision: str, endpoint: str) -> str:
    from huggingface_hub import constants, errors

    log_in = "`hf auth login`, or the variable HF_TOKEN, tells the hub who you are"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"access to {repo} must be granted at {endpoint}/{repo} by its owners, to an account "
            f"that you are logged in to: {log_in}"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{endpoint} has no model {repo}, or it is private: {log_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision}; a branch, a tag or a commit of it would work"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if status in (401, 403):
        return f"{endpoint} refuses this with {status} ({_line(error)}): {log_in}"
    if constants.is_offline_mode():
        return (
            f"HF_HUB_OFFLINE is set, and the cache {constants.HF_HUB_CACHE} has not all of {repo} "
            f"at {revision}; without that variable it is downloaded"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        cause = error.__cause__ or error
        return (
            f"{endpoint} cannot be reached ({_line(cause)}), and the cache "
            f"{constants.HF_HUB_CACHE} has not all of {repo} at {revision}"
        )
    return _line(error)


def _line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
