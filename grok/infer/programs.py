"""Compiled programs of an engine, kept on this machine's disk and loaded without tracing.

JAX's own cache saves compiling. For a small model tracing and lowering take longer, so here a
program's key is all that tracing depends on: its arguments' shapes, types and static parts, this
package's source, versions, JAX's settings, the kernels in C and the processor.

A stored program is machine code in a pickle: whoever writes to the folder runs code here, as with
JAX's cache beside it. The folder is the user's alone, files that others own or may write are not
read, and nothing that was downloaded gets there.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import pickle
import platform
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.experimental.compilation_cache.compilation_cache as jax_cache
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from grok import hardware
from grok.ops.cpu import library

MAX_PROGRAMS = 128  # files of the folder; the oldest are deleted
DIGEST_BYTES = 32
OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
# Folders of this package with what is traced.
TRACED = ("config", "sharding", "ops", "model", "infer")
PACKAGES = ("jax", "jaxlib", "numpy", "ml_dtypes")


class Programs:
    """Runs the functions of one engine, each compiled, or loaded from `store`, at its first call.
    Calls of a function differ in the type of their last argument alone. `static` is what the
    functions read besides their arguments."""

    def __init__(self, store: "ProgramStore | None", mesh: Mesh, static: object):
        is_one_cpu = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
        self._store = store if is_one_cpu and jax.process_count() == 1 else None
        self._mesh, self._static = mesh, static
        self._programs: dict[tuple[Callable, type], Callable] = {}

    def __call__(self, function: Any, *args: Any) -> Any:
        """The result of `function`, which JAX has jitted, on the mesh."""
        key = function, type(args[-1]) if args else type(None)
        program = self._programs.get(key)
        if program is None:
            program = function
            if self._store is not None:
                program = self._store.program(function, args, self._mesh, self._static)
            self._programs[key] = program
        return program(*args)


class ProgramStore:
    """Programs in a folder that belongs to this user."""

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def of_user(cls) -> "ProgramStore":
        """The store beside JAX's compiled programs in the user's cache."""
        return cls(hardware.user_cache().parent / "programs")

    def program(self, function: Any, args: tuple, mesh: Mesh, static: object) -> Callable:
        """`function` compiled for such arguments on the ambient `mesh`, loaded where it is stored,
        else compiled and stored."""
        description = _describe(function, args, mesh, static)
        if " at 0x" in description:  # an object that another process would not describe alike
            return function
        digest = hashlib.sha256(description.encode()).hexdigest()[:32]
        file = self.folder / f"{function.__name__}-{digest}"
        return _load(file, args, mesh) or self._compile(function, args, file)

    def _compile(self, function: Any, args: tuple, file: Path) -> Callable:
        with _without_jax_cache():
            compiled = function.lower(*args).compile()
        # Otherwise the next start compiles again: XLA cannot serialize every program.
        with contextlib.suppress(OSError, ValueError, TypeError, RuntimeError):
            self._write(file, _serialize(compiled))
        return compiled

    def _write(self, file: Path, data: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, unfinished = tempfile.mkstemp(dir=self.folder)  # readable by the user alone
        with os.fdopen(handle, "wb") as stream:
            stream.write(hashlib.sha256(data).digest() + data)
        os.replace(unfinished, file)
        files = sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        for old in files[:-MAX_PROGRAMS]:
            old.unlink(missing_ok=True)


def _serialize(compiled: Any) -> bytes:
    data, _, structure = serialize_executable.serialize(compiled)
    results = jax.tree.unflatten(structure, range(structure.num_leaves))
    return pickle.dumps((data, results))


def _load(file: Path, args: tuple, mesh: Mesh) -> Any:
    """The program in a file, for such arguments; None where there is none that can be used."""
    try:
        with file.open("rb") as stream:
            status = os.fstat(stream.fileno())
            is_mine = status.st_uid == os.getuid() and not status.st_mode & OTHERS_MAY_WRITE
            digest, data = stream.read(DIGEST_BYTES), stream.read()
        if not is_mine or hashlib.sha256(data).digest() != digest:
            return None
        data, results = pickle.loads(data)
        structures = jax.tree.structure((args, {})), jax.tree.structure(results)
        devices = list(mesh.devices.flat)
        return serialize_executable.deserialize_and_load(
            data, *structures, backend=devices[0].client, execution_devices=devices
        )
    except Exception:  # of no class in particular: what is damaged is compiled again
        return None


@contextlib.contextmanager
def _without_jax_cache() -> Iterator[None]:
    """Compiles anew: a program that JAX's cache returned cannot be serialized a second time, since
    the result lacks some of its functions (jaxlib 0.12)."""
    is_enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    jax_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", is_enabled)
        jax_cache.reset_cache()


def _describe(function: Any, args: tuple, mesh: Mesh, static: object) -> str:
    leaves, structure = jax.tree.flatten(args)
    types = [repr(jax.typeof(leaf)) for leaf in leaves]
    name = f"{function.__module__}.{function.__qualname__}"
    return "\n".join((_environment(), name, repr(static), repr(mesh), str(structure), *types))


@functools.cache
def _environment() -> str:
    """All that every program of this process depends on."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    machine = platform.machine(), platform.python_version(), hardware.processor()
    settings = sorted(jax.config.values.items())
    flags = os.environ.get("XLA_FLAGS"), hardware.num_cores()
    sources = _source_digest(Path(__file__).parents[1])
    return repr((sources, versions, machine, settings, flags, library.load().targets))


def _source_digest(package: Path) -> str:
    digest = hashlib.sha256()
    for folder in (package / name for name in TRACED):
        for path, _, files in sorted(os.walk(folder)):
            for name in sorted(name for name in files if name.endswith((".py", ".c", ".h"))):
                file = os.path.join(path, name)
                digest.update(os.path.relpath(file, package).encode())
                with open(file, "rb", buffering=0) as stream:
                    digest.update(stream.read())
    for module in sorted(package.glob("*.py")):
        digest.update(module.read_bytes())
    return digest.hexdigest()
