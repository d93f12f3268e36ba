"""`run.json`: what a stranger needs to audit a run, kept up to date while it goes on.

id            of this run, made at its first start
config        as of the last start
data          each prepared dataset with the SHA-256 of its manifest, each text file and the
              tokenizer with that of their bytes
starts        one entry for each process (the first of its hosts) that worked on the run: when it
              `began` and `ended`, the steps it went on from and came to, its exit code (null:
              killed, or still going), code, packages, devices, mesh, config if it was another
checkpoints   every one that was written, by step: number of files, bytes, and a SHA-256 over
              names, sizes, and contents of files up to a mebibyte, where Orbax keeps its indices
"""

import datetime
import hashlib
import importlib.metadata
import json
import platform
import secrets
import subprocess
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from grok import __version__, storage
from grok.config import RunConfig
from grok.config.load import to_dict
from grok.train.run_data import RunData

PACKAGES = (
    "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain", "numpy",
    "sentencepiece",
)  # fmt: skip
SMALL_FILE = 2**20


class RunManifest:
    """The `run.json` in a run's folder, here or at gs://; without a folder nothing is written."""

    def __init__(self, folder: str | None, config: RunConfig, mesh: Mesh, data: RunData):
        """Takes up what earlier processes wrote; `resumed` writes the entry of this one."""
        self._folder = folder
        if folder is None:
            return
        self._facts = read_manifest(folder) or {"id": secrets.token_hex(4), "starts": []}
        checkpoints = self._facts.get("checkpoints", {})
        before = self._facts.get("config")
        self._facts["config"] = to_dict(config)
        self._facts["data"] = describe_data(config, data)
        self._facts["checkpoints"] = checkpoints
        self._start: dict[str, Any] = {"began": _now(), "ended": None}
        self._start |= {"first_step": None, "last_step": None, "exit_code": None}
        self._start |= describe_program() | describe_devices(mesh)
        if before not in (None, self._facts["config"]):
            self._start["config_before"] = before
        self._facts["starts"].append(self._start)

    @property
    def run_id(self) -> str:
        """The run's identifier, eight hexadecimal digits."""
        return self._facts["id"]

    def resumed(self, step: int) -> None:
        """Records that this process resumes after `step`."""
        if self._folder is not None:
            self._start["first_step"] = self._start["last_step"] = step
            self._write()

    def saved(self, step: int) -> None:
        """A save of `step` has begun; those before it are whole by now."""
        if self._folder is not None:
            self._start["last_step"] = step
            self._note_checkpoints(before=step)
            self._write()

    def ended(self, step: int, code: int) -> None:
        """This process ends after `step`, all saves written, with exit code `code`."""
        if self._folder is not None:
            self._start |= {"ended": _now(), "last_step": step, "exit_code": code}
            self._note_checkpoints(before=None)
            self._write()

    def _note_checkpoints(self, before: int | None) -> None:
        """Records the checkpoints that are not yet."""
        folder = storage.join(self._folder or "", "checkpoints")
        known = self._facts["checkpoints"]
        for name in storage.list_files(folder) if storage.exists(folder) else ():
            due = name.isdecimal() and (before is None or int(name) < before)
            if due and name not in known:
                known[name] = describe_checkpoint(storage.join(folder, name))
        self._facts["checkpoints"] = dict(sorted(known.items(), key=lambda item: int(item[0])))

    def _write(self) -> None:
        text = json.dumps(self._facts, indent=1) + "\n"
        storage.write_bytes(storage.join(self._folder or "", "run.json"), text.encode())


def read_manifest(folder: str) -> dict[str, Any] | None:
    """The `run.json` of a run's folder; None where there is none that can be read."""
    try:
        facts = json.loads(storage.read_bytes(storage.join(folder, "run.json")))
    except (FileNotFoundError, ValueError):
        return None
    return facts if isinstance(facts, dict) and {"id", "starts"} <= facts.keys() else None


def describe_run(config: RunConfig, mesh: Mesh) -> str:
    """One line about model, mesh and batch."""
    model, data = config.model, config.data
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    shapes = f"{data.batch_size} rows of {data.sequence_length} tokens a step"
    for step, batch_size, length in data.shapes()[1:]:
        shapes += f", {batch_size} of {length} from step {step}"
    return (
        f"{model.num_parameters():,} parameters ({model.num_active_parameters():,} a token) on "
        f"mesh {axes}; {shapes}"
    )


def describe_program() -> dict[str, Any]:
    """Version of grok, its commit where it runs from a clone, and the packages that decide bits."""
    return {
        "grok": __version__,
        **code_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def code_version() -> dict[str, Any]:
    """Commit of the code, and whether files differ from it; both None outside a git clone."""
    package = Path(__file__).parents[2]
    commit = _git(package, "rev-parse", "HEAD")
    tracked = _git(package, "ls-files", "--error-unmatch", "__init__.py")
    if commit is None or tracked is None:
        return {"commit": None, "dirty": None}
    status = _git(package, "status", "--porcelain", "--untracked-files=no", ".", "../configs")
    return {"commit": commit.strip(), "dirty": bool(status)}


def describe_devices(mesh: Mesh) -> dict[str, Any]:
    """What the run's arrays live on."""
    device = mesh.devices.flat[0]
    return {
        "devices": {
            "kind": device.device_kind,
            "platform": device.platform,
            "count": mesh.devices.size,
            "processes": jax.process_count(),
        },
        "mesh": dict(mesh.shape),
    }


def describe_data(config: RunConfig, data: RunData) -> list[dict[str, str]]:
    """What is trained and validated on, and the tokenizer, with hashes."""
    files = (*config.data.train, *config.data.validation, config.data.tokenizer)
    hashes = [{"dataset": each["path"], "manifest": each["hash"]} for each in data.hashes]
    for path in files:
        hashes.append(
            {"file": path, "sha256": hashlib.sha256(storage.read_bytes(path)).hexdigest()}
        )
    return hashes


def describe_checkpoint(folder: str) -> dict[str, Any]:
    """Size and hash of a checkpoint, read in a moment whatever its size."""
    files = storage.list_tree(folder)
    digest = hashlib.sha256()
    for name, size in sorted(files.items()):
        digest.update(f"{name}\0{size}\0".encode())
        if size <= SMALL_FILE:
            digest.update(storage.read_bytes(storage.join(folder, name)))
    return {"files": len(files), "bytes": sum(files.values()), "sha256": digest.hexdigest()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says; None where it fails or is not installed."""
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
