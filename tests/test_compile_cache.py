"""Compiled programs in a folder that processes share, each with a disk of its own."""

import errno
import fcntl
import shutil

import jax
import jax.numpy as jnp
import pytest
from jax._src import compilation_cache, compiler

from grok import compile_cache, storage
from grok.compile_cache import SharedPrograms, folder_for
from tests.emulator import bucket


@pytest.fixture(scope="module")
def emulated():
    with bucket() as client:
        yield client


@pytest.fixture(params=["here", "bucket"])
def folder(request, tmp_path, emulated):
    before = jax.config.jax_compilation_cache_dir
    compile_and_write = compiler._compile_and_write_cache
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    yield str(tmp_path / "c") if request.param == "here" else f"gs://bucket/{tmp_path.name}/c"
    compiler._compile_and_write_cache = compile_and_write
    jax.config.update("jax_compilation_cache_dir", before)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    compilation_cache.reset_cache()


@pytest.fixture
def start(folder, tmp_path, monkeypatch):
    """Starts with an empty disk and runs a program; returns programs compiled and what is told."""
    original = compiler._compile_and_write_cache

    def start_with(disk: str, process: int = 0) -> tuple[int, list[str]]:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / disk))
        monkeypatch.setattr(compile_cache, "process_index", lambda: process)
        compiler._compile_and_write_cache = original
        jax.clear_caches()
        told: list[str] = []
        programs = compile_cache.share(folder, told.append)
        assert isinstance(programs, SharedPrograms)
        assert float(jax.jit(lambda x: jnp.sin(x) * 3)(jnp.float32(0))) == 0
        programs.close()
        return programs.compiled, told

    return start_with


def test_a_second_start_with_an_empty_disk_compiles_nothing(start, folder):
    compiled, told = start("one")
    assert compiled > 0
    assert told == []
    assert len(storage.list_files(folder)) == compiled
    assert start("two") == (0, [f"{compiled} compiled programs from {folder}"])


def test_a_process_other_than_the_first_stores_what_it_compiles(start, folder):
    compiled, _ = start("one", process=3)
    assert compiled > 0
    assert start("two", process=3)[0] == 0


def test_a_program_that_cannot_be_read_is_compiled_and_stored_again(start, folder):
    start("one")
    name = next(iter(storage.list_files(folder)))
    storage.write_bytes(storage.join(folder, name), b"half of a pro")
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache"):
        assert start("two")[0] == 1
    assert start("two")[0] == 0  # with the disk as it is
    assert start("three")[0] == 0


def test_a_folder_that_cannot_be_used_costs_nothing_but_a_sentence(start, folder, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError("Forbidden")

    monkeypatch.setattr(storage, "exists", refuse)
    monkeypatch.setattr(storage, "copy", refuse)
    compiled, told = start("one")
    assert compiled > 0
    assert told == [
        f"{folder} (compiled programs) cannot be {done}: Forbidden" for done in ("read", "written")
    ]


def test_a_disk_that_cannot_be_used_costs_nothing_but_a_sentence(folder, tmp_path, monkeypatch):
    told: list[str] = []
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compile_cache.share(folder, told.append) is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "disk"))

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert compile_cache.share(folder, told.append) is None
    prefix = f"{folder} (compiled programs) cannot be copied to this machine: "
    assert all(sentence.startswith(prefix) for sentence in told)
    assert ["Not a directory" in told[0], "No locks available" in told[1]] == [True, True]


def test_what_a_killed_process_left_half_written_is_removed(start, tmp_path):
    start("one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (local,) = (tmp_path / "two").rglob("shared/*/0")
    left = local / ".a-cache.1234.unfinished"
    left.touch()
    assert start("two")[0] == 0
    assert not left.exists()


def test_where_programs_are_shared(monkeypatch):
    assert folder_for("", "runs/a") == ""
    assert folder_for("", "gs://b/runs/a") == "gs://b/runs/a/compiled"
    assert folder_for("gs://b/c", "runs/a") == "gs://b/c"
    monkeypatch.setattr(compile_cache, "process_count", lambda: 2)
    assert folder_for("", "runs/a") == "runs/a/compiled"
