"""Programs of an engine in the user's cache: a second start traces nothing, and what cannot be used
is compiled again."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

import grok
from grok.config import EngineConfig
from grok.config.sampling import SamplingParams
from grok.infer import programs
from grok.infer.engine import Engine
from grok.infer.programs import ProgramStore
from grok.infer.request import Request
from grok.ops.cpu import library

OPTIONS = EngineConfig(max_num_seqs=2, page_size=16, prefill_chunk_size=16, num_pages=8)
PARAMS = SamplingParams(max_tokens=4, temperature=1.0, seed=5, logprobs=2)
TRACED = "/jax/core/compile/jaxpr_trace_duration"


@pytest.fixture(scope="module")
def model(tiny_run):
    return grok.init(tiny_run.model, jax.random.key(3), grok.make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ProgramStore:
    return ProgramStore(tmp_path_factory.mktemp("cache") / "programs")


@pytest.fixture(scope="module")
def first(model, store) -> list:
    return answer(model, store)


def answer(model, store: ProgramStore | None) -> list:
    mesh = grok.make_mesh(devices=jax.devices()[:1])
    engine = Engine(model, None, mesh, OPTIONS, store)
    return [
        (output.token_ids, output.logprobs)
        for output in engine.generate([Request("a", (5, 6, 7), PARAMS)])
    ]


def test_answers_are_those_without_a_store(model, store, first):
    assert first == answer(model, None)
    assert {file.name.rpartition("-")[0] for file in store.folder.iterdir()} == {
        *("init_cache", "init_slots", "forward_and_sample")
    }
    assert store.folder.stat().st_mode & 0o777 == 0o700


def test_a_second_start_traces_nothing(model, store, first):
    events = []
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: events.append(name)
    )
    try:
        assert answer(model, store) == first
    finally:
        jax.monitoring.clear_event_listeners()
    assert TRACED not in events


@pytest.mark.parametrize("damage", [b"", b"x" * 1000])
def test_what_is_damaged_is_compiled_again(model, store, first, damage):
    sizes = {file: file.stat().st_size for file in store.folder.iterdir()}
    file = next(file for file in sizes if file.name.startswith("init_slots"))
    file.write_bytes(damage)
    assert answer(model, store) == first
    assert file.stat().st_size == pytest.approx(sizes[file], rel=0.1)


def test_a_file_that_others_may_write_is_not_read(model, store, first):
    for file in store.folder.iterdir():
        file.chmod(0o666)
    assert answer(model, store) == first
    assert {file.stat().st_mode & 0o777 for file in store.folder.iterdir()} == {0o600}


def test_a_program_that_xla_cannot_serialize_runs(model, first, monkeypatch, tmp_path):
    def refuse(compiled):
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: `LessThan` is not serializable.")

    monkeypatch.setattr(programs, "_serialize", refuse)
    mesh = grok.make_mesh(devices=jax.devices()[:1])
    engine = Engine(model, None, mesh, OPTIONS, ProgramStore(tmp_path / "programs"))
    assert engine.unfinished == 0
    assert not (tmp_path / "programs").exists()


@pytest.mark.parametrize(("name", "value"), [("GROK_CPU_KERNELS", "0"), ("XLA_FLAGS", "--x=1")])
def test_other_settings_are_other_programs(monkeypatch, name, value):
    before = programs._environment()
    library.load.cache_clear()
    programs._environment.cache_clear()
    monkeypatch.setenv(name, value)
    try:
        assert programs._environment() != before
    finally:
        library.load.cache_clear()
        programs._environment.cache_clear()


def test_edited_sources_are_other_programs(monkeypatch, tmp_path):
    digest = programs._source_digest(tmp_path)
    (tmp_path / "ops" / "attention").mkdir(parents=True)
    (tmp_path / "ops" / "attention" / "paged.py").write_text("SCALE = 1")
    first = programs._source_digest(tmp_path)
    (tmp_path / "ops" / "attention" / "paged.py").write_text("SCALE = 2")
    assert len({digest, first, programs._source_digest(tmp_path)}) == 3


def test_all_that_a_step_imports_is_in_the_digest():
    code = "import grok.infer.step, grok.infer.shapes, sys; print(*sys.modules, sep='\\n')"
    command = [sys.executable, "-c", code]
    modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    names = {name.split(".")[1] for name in modules if name.startswith("grok.")}
    package = Path(programs.__file__).parents[1]
    assert {name for name in names if (package / name).is_dir()} == set(programs.TRACED)


def test_sampling_imports_nothing_that_it_does_not_need():
    code = "import grok.infer.loader, grok.infer.engine, grok.infer.interactive, grok.weights.load"
    listing = f"{code}; import sys; print(*sys.modules, sep='\\n')"
    command = [sys.executable, "-c", listing]
    modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "jax" in modules
    heavy = {"orbax", "grain", "matplotlib", "pyarrow", "huggingface_hub", "gcsfs"}
    heavy |= {"jax.experimental.pallas", "jax.experimental.mosaic"}
    assert not heavy & set(modules)
