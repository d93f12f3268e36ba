"""The kernels' library: compiled on this machine at the first use, then loaded.

It is compiled here, not when the package is built, because it depends on this processor's
instructions and on the headers of the installed jaxlib: a wheel stays one for all platforms, its
build needs no jaxlib, and a compiler that is installed later takes effect. The source is that of
the package. Without a compiler the portable forms run, which XLA compiles.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from grok import hardware

SOURCES = Path(__file__).parent / "src"
MAIN = "kernels.c"
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O2", "-ftree-vectorize", "-march=native", "-std=gnu11", "-fPIC", "-shared", "-w")
SWITCH = "GROK_CPU_KERNELS"  # 0 in the environment: the portable forms
TARGETS = (
    *("grok_multiply", "grok_score", "grok_experts", "grok_attention", "grok_argmax"),
    "grok_logsumexp",
)


class Library(NamedTuple):
    """The kernels' names for XLA by those in the source; empty, with the `reason`, where they
    cannot be used."""

    targets: dict[str, str]
    reason: str

    @property
    def is_usable(self) -> bool:
        """True where the kernels are there."""
        return bool(self.targets)


@functools.cache
def load() -> Library:
    """The library, compiled if this version of it never was on this kind of processor."""
    if os.environ.get(SWITCH) == "0":
        return Library({}, f"{SWITCH}=0 asks for the portable forms")
    key = _key()
    file = hardware.user_cache().parent / "kernels" / f"{key}.so"
    try:
        if not file.exists():
            _compile(file)
        return Library(_register(file, key), f"compiled as {file}")
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        return Library({}, _reason(error))


def _key() -> str:
    """A name that changes with the source, the interface of XLA and the processor."""
    digest = hashlib.sha256(" ".join((platform.machine(), *FLAGS)).encode())
    for file in (*sorted(SOURCES.iterdir()), _include_folder() / "xla/ffi/api/c_api.h"):
        digest.update(file.read_bytes())
    digest.update(hardware.processor())
    return digest.hexdigest()[:16]


def _include_folder() -> Path:
    import jax.ffi

    return Path(jax.ffi.include_dir())


def _compile(file: Path) -> None:
    """Compiles the library to `file`, which is there complete or not at all."""
    names = filter(None, (os.environ.get("CC"), *COMPILERS))
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise OSError(f"there is no C compiler here ({', '.join(COMPILERS)})")
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        unfinished = Path(folder, file.name)
        command = [compiler, *FLAGS, f"-I{_include_folder()}", str(SOURCES / MAIN)]
        subprocess.run(
            [*command, "-o", str(unfinished), "-lm"], check=True, capture_output=True, text=True
        )
        unfinished.replace(file)


def _register(file: Path, key: str) -> dict[str, str]:
    """Loads the library and makes its kernels known to XLA, by names of this version of them: a
    program that was compiled with another is not run with this one."""
    import jax.ffi

    library = ctypes.CDLL(str(file))
    targets = {name: f"{name}_{key}" for name in TARGETS}
    for name, target in targets.items():
        capsule = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(target, capsule, platform="cpu")
    return targets


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = str(error.stderr).strip().splitlines()
        return f"{Path(error.cmd[0]).name} failed: {lines[-1] if lines else error.returncode}"
    return str(error)
