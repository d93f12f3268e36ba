"""The compiler's options: training, evaluation, the engine and plans compile with the same ones."""

import dataclasses

import jax
import pytest

import grok
from grok import compiler, hardware
from grok.config import EngineConfig
from grok.config.sampling import SamplingParams
from grok.errors import GrokError
from grok.evaluate.scores import Scorer
from grok.infer.engine import Engine
from grok.infer.request import Request
from grok.plan import compile_process
from grok.plan.topology import parse_slice
from grok.train import loop


def test_devices_that_are_no_tpus_have_no_options():
    assert compiler.compiler_options("cpu") is None
    assert set(compiler.OPTIONS) <= set(hardware.CHIPS)


def train(config):
    loop.run_training(config)


def generate(config):
    mesh = grok.make_mesh(2, 2, 2)
    model = grok.init(config.model, jax.random.key(0), mesh)
    engine = Engine(model, None, mesh, EngineConfig(max_num_seqs=4, page_size=8))
    engine.submit(Request("one", (1, 2, 3), SamplingParams(max_tokens=4)))
    engine.step()


def score(config):
    mesh = grok.make_mesh(2, 2, 2)
    Scorer(grok.init(config.model, jax.random.key(0), mesh), mesh, 8).score([((1, 2), (3,))])


def plan(config):
    slice_ = parse_slice("v5p:2x2x2")
    compile_process.compile_step(config, slice_, {})


@pytest.mark.parametrize("run", [train, generate, score, plan])
def test_every_step_is_compiled_with_the_options_of_its_devices(
    run, tiny_run, tmp_path, monkeypatch
):
    """An option that no compiler knows is refused, so it got there."""
    monkeypatch.setattr(hardware, "device_kind", lambda: "TPU of the future")
    monkeypatch.setattr(compiler, "compiler_options", {"TPU of the future": {"xla_new": 1}}.get)
    monkeypatch.setattr(compile_process, "topology_devices", lambda slice_: jax.devices())
    with pytest.raises((jax.errors.JaxRuntimeError, GrokError), match="xla_new"):
        run(dataclasses.replace(tiny_run, folder=str(tmp_path / "run")))
