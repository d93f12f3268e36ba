"""The folder of a run while it goes on, and its `run.json`: the facts that an audit needs.

`id` of this run, made at its first start; `config` as of the last start; `data`: each prepared
dataset with the SHA-256 of its manifest, each text file and the tokenizer with that of their bytes;
`adapters` of a LoRA run, in words;
`starts`: an entry for each process (the first of its hosts) that worked on the run: when it `began`
and `ended`, its steps, exit code (null: killed, or still running), code, packages, devices, mesh,
config if it was another; `checkpoints`: every one that was written, by step: number of files,
bytes, SHA-256 over names, sizes, and contents of files up to a mebibyte, Orbax's indices."""

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import platform
import secrets
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from grok import __version__, storage
from grok.config import RunConfig
from grok.config.load import to_dict
from grok.data.dataset import TokenDataset
from grok.data.manifest import MANIFEST_FILE
from grok.data.text_files import text_files
from grok.data.tokenizers import tokenizer_file
from grok.errors import CheckpointError
from grok.model.params import describe_lora, num_active_parameters, num_parameters
from grok.train.run_data import RunData

PACKAGES = (
    "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain", "numpy",
    "sentencepiece", "tokenizers", "tiktoken",
)  # fmt: skip


class RunDir:
    """A local folder, `path`, for the files of a run's folder. It is the run's folder itself, or,
    since nothing can be appended to at gs://, a temporary one: entering downloads the files to
    append to, and `upload` and leaving copy back what has changed."""

    def __init__(self, folder: str):
        self._folder = folder
        self._uploaded: dict[str, int] = {}  # bytes, by name
        self._temporary = tempfile.TemporaryDirectory() if storage.is_remote(folder) else None
        self.path = Path(self._temporary.name if self._temporary else folder)

    def __enter__(self) -> "RunDir":
        """Raises CheckpointError if the folder cannot be read."""
        if self._temporary:
            with storage.errors(self._folder, CheckpointError):
                for name in ("metrics.jsonl", "events.jsonl"):
                    if storage.exists(storage.join(self._folder, name)):
                        storage.copy(storage.join(self._folder, name), self.path / name)
        return self

    def __exit__(self, *_: object) -> None:
        if self._temporary:
            # The failure that ended the run may be the same.
            with contextlib.suppress(OSError):
                self.upload()
            self._temporary.cleanup()

    def upload(self) -> None:
        """Copies the files whose size has changed to gs://. Raises OSError."""
        if not self._temporary:
            return
        for name, size in storage.list_tree(self.path).items():
            if self._uploaded.get(name) != size:
                storage.copy(self.path / name, storage.join(self._folder, name))
                self._uploaded[name] = size


class RunManifest:
    """The `run.json` in a run's folder, here or at gs://."""

    def __init__(self, folder: str, config: RunConfig, mesh: Mesh, data: RunData):
        """Reads what earlier processes wrote; `resumed` writes the entry of this one."""
        self._folder = folder
        self._facts = read_manifest(folder) or {"id": secrets.token_hex(4), "starts": []}
        self.run_id: str = self._facts["id"]  # eight hexadecimal digits
        checkpoints = self._facts.get("checkpoints", {})
        config_before = self._facts.get("config")
        self._facts |= {"config": to_dict(config), "data": describe_data(config, data)}
        if adapters := describe_adapters(config):
            self._facts["adapters"] = adapters
        self._facts["checkpoints"] = checkpoints
        self._process: dict[str, Any] = {"began": _now(), "ended": None}
        self._process |= {"first_step": None, "last_step": None, "exit_code": None}
        self._process |= describe_program()
        self._process |= {"devices": device_facts(mesh.devices.flat), "mesh": dict(mesh.shape)}
        if config_before not in (None, self._facts["config"]):
            self._process["config_before"] = config_before
        self._facts["starts"].append(self._process)

    def resumed(self, step: int) -> None:
        """Records that this process resumes after `step`."""
        self._process["first_step"] = self._process["last_step"] = step
        self._write()

    def saved(self, step: int) -> None:
        """Records that a save of `step` has begun; those before it are complete."""
        self._process["last_step"] = step
        self._add_checkpoints(before=step)
        self._write()

    def ended(self, step: int, code: int) -> None:
        """Records that this process ends after `step`, all saves complete, with exit `code`."""
        self._process |= {"ended": _now(), "last_step": step, "exit_code": code}
        self._add_checkpoints(before=None)
        self._write()

    def _add_checkpoints(self, before: int | None) -> None:
        folder = storage.join(self._folder, "checkpoints")
        checkpoints = self._facts["checkpoints"]
        for name in storage.list_files(folder) if storage.exists(folder) else ():
            complete = name.isdecimal() and (before is None or int(name) < before)
            if complete and name not in checkpoints:
                checkpoints[name] = describe_checkpoint(storage.join(folder, name))
        self._facts["checkpoints"] = dict(sorted(checkpoints.items(), key=lambda c: int(c[0])))

    def _write(self) -> None:
        text = json.dumps(self._facts, indent=1) + "\n"
        storage.write_bytes(storage.join(self._folder, "run.json"), text.encode())


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
    a_token = f" ({num_active_parameters(model):,} a token)" if model.moe else ""
    return f"{num_parameters(model):,} parameters{a_token} on mesh {axes}; {shapes}"


def describe_adapters(config: RunConfig) -> str | None:
    """One line about the adapters and the weights that they belong to; None without any."""
    if not config.lora.rank:
        return None
    return f"LoRA: {describe_lora(config.model, config.lora)}; base {config.train.init_from}"


def describe_program() -> dict[str, Any]:
    """Version of grok, its commit where it runs from a clone, and the packages that decide bits."""
    return {
        "grok": __version__,
        **code_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {
            name: package.version
            for name in PACKAGES
            for package in [*importlib.metadata.distributions(name=name)][:1]
        },
    }


def code_version() -> dict[str, Any]:
    """Commit of the code, and whether files differ from it; both None outside a git clone."""
    package = Path(__file__).parents[2]
    commit = _git(package, "rev-parse", "HEAD")
    if commit is None or _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return {"commit": None, "dirty": None}
    status = _git(package, "status", "--porcelain", "--untracked-files=no", ".", "../configs")
    return {"commit": commit.strip(), "dirty": bool(status)}


def describe_commit(program: Mapping[str, Any]) -> str:
    """The commit of `code_version`, and a note where files had been changed."""
    commit = program.get("commit")
    return commit[:12] + (" with changes" if program["dirty"] else "") if commit else "unknown"


def device_facts(devices: Iterable[jax.Device]) -> dict[str, Any]:
    """Kind, platform and number of the devices and of the processes that they belong to."""
    devices = list(devices)
    return {
        "kind": devices[0].device_kind,
        "platform": devices[0].platform,
        "count": len(devices),
        "processes": jax.process_count(),
    }


def describe_devices(facts: dict[str, Any]) -> str:
    """`device_facts` in words, as in `8 x TPU v5p in 2 processes`."""
    count = facts["processes"]
    return f"{facts['count']} x {facts['kind']} in {count} process{'es' if count > 1 else ''}"


def describe_data(config: RunConfig, data: RunData) -> list[dict[str, str]]:
    """The training and validation data, that of the domains, and the tokenizer, with hashes."""
    tokenizer = tokenizer_file(config.data.tokenizer)
    texts = [*text_files(config.data.train), *text_files(config.data.validation), tokenizer]
    hashes = {dataset["path"]: dataset["hash"] for dataset in data.hashes}
    for path in filter(None, (config.data.validation_dataset, *config.data.domains)):
        if storage.exists(storage.join(path, MANIFEST_FILE)):
            hashes[path] = TokenDataset(path).hash
        else:
            texts.append(path)
    return [{"dataset": path, "manifest": digest} for path, digest in hashes.items()] + [
        {"file": path, "sha256": hashlib.sha256(storage.read_bytes(path)).hexdigest()}
        for path in dict.fromkeys(texts)
    ]


def describe_checkpoint(folder: str) -> dict[str, Any]:
    """Size and hash of a checkpoint; only its small files are read."""
    files = storage.list_tree(folder)
    digest = hashlib.sha256()
    for name, size in sorted(files.items()):
        digest.update(f"{name}\0{size}\0".encode())
        if size <= 2**20:
            digest.update(storage.read_bytes(storage.join(folder, name)))
    return {"files": len(files), "bytes": sum(files.values()), "sha256": digest.hexdigest()}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
