"""The public names of `grok`: a loop of one's own, and what comes of its weights."""

import ast
import dataclasses
import functools
import importlib
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from click.testing import CliRunner

import grok
from docs import api_reference
from grok.cli.main import main
from grok.data.chat.template import built_in
from grok.errors import DONE, CheckpointError, ConfigError, EngineError, RequestError
from grok.infer.engine import Engine
from grok.train.loop import run_training
from grok.train.telemetry.metrics_file import read_metrics

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3
TALK = [{"role": "user", "content": "What comes after 3?"}]


def own_loop(config: grok.RunConfig) -> list[np.float32]:
    """The losses of a run that is trained and saved by public names alone."""
    mesh, optimizer = grok.mesh_for(config), grok.make_optimizer(config)
    state = grok.init_state(config, optimizer, mesh)
    step = functools.partial(grok.train_step, config=config, optimizer=optimizer)
    step = grok.jit(step, donate_argnums=0)
    losses = []
    with jax.set_mesh(mesh):
        for batch in grok.batches(config, mesh):
            state, metrics = step(state, batch)
            losses.append(np.float32(metrics["loss"]))
    grok.save_checkpoint(config, state)
    return losses


def logged_losses(config: grok.RunConfig) -> list[np.float32]:
    lines = read_metrics(Path(config.folder) / "metrics.jsonl")
    return [np.float32(line["loss"]) for line in lines if "loss" in line]


def with_steps(config: grok.RunConfig, steps: int, folder: Path) -> grok.RunConfig:
    train = dataclasses.replace(config.train, steps=steps)
    return dataclasses.replace(config, train=train, folder=str(folder))


@pytest.fixture(scope="module")
def own_run(tiny_run, tmp_path_factory) -> tuple[grok.RunConfig, list[np.float32]]:
    """The config and losses of such a run. Its learning rate does not depend on its length."""
    data = dataclasses.replace(tiny_run.data, validation=())
    optimizer = dataclasses.replace(tiny_run.optimizer, schedule="constant")
    config = dataclasses.replace(tiny_run, data=data, optimizer=optimizer)
    config = with_steps(config, STEPS, tmp_path_factory.mktemp("own"))
    return config, own_loop(config)


@pytest.fixture(scope="module")
def llm(own_run) -> grok.LLM:
    return grok.LLM(own_run[0].folder, chat_template="grok-1")


def test_the_losses_of_a_loop_are_those_of_grok_train(own_run, tmp_path):
    config, losses = own_run
    reference = with_steps(config, STEPS, tmp_path)
    assert run_training(reference) == DONE
    assert losses == logged_losses(reference)


@pytest.mark.prove
def test_grok_train_goes_on_from_a_loop_bit_for_bit(tiny_run, own_run, tmp_path):
    config, losses = own_run
    reference = with_steps(config, STEPS + 2, tmp_path / "reference")
    assert run_training(reference) == DONE
    config = with_steps(config, STEPS, tmp_path / "own")
    assert own_loop(config) == losses
    assert run_training(with_steps(config, STEPS + 2, tmp_path / "own")) == DONE
    assert losses + logged_losses(config) == logged_losses(reference)


def test_completions_are_those_of_grok_sample(own_run, llm):
    prompts = ["The number 3", "comes after"]
    options = ["--n", "2", "--seed", "5", "--temperature", "1.0", "--top-p", "0.9"]
    asked = [option for prompt in prompts for option in ("--prompt", prompt)]
    words = ["sample", own_run[0].folder, *asked, "--max-tokens", "7", *options]
    params = grok.SamplingParams(n=2, seed=5, top_p=0.9, max_tokens=7)
    outputs = llm.generate(prompts, params)
    texts = [prompts[i // 2] + output.text for i, output in enumerate(outputs)]
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.output == "".join(f"{text}\n\n" for text in texts)
    assert [output.index for output in outputs] == [0, 1, 2, 3]
    assert {output.finish_reason for output in outputs} == {"length"}
    assert {len(output.token_ids) for output in outputs} == {7}


@pytest.mark.prove
def test_an_export_and_one_checkpoint_answer_as_the_run(own_run, llm, tmp_path):
    run, out = Path(own_run[0].folder), tmp_path / "hf"
    CliRunner().invoke(main, ["export", "hf", str(run), str(out)], catch_exceptions=False)
    params = grok.SamplingParams(max_tokens=5, temperature=0)
    expected = llm.generate("The number 3", params)
    for weights in (out, run / "checkpoints" / str(STEPS)):
        assert grok.LLM(weights).generate("The number 3", params) == expected


def test_int8_activations_answer_alike_beside_others(own_run):
    llm = grok.LLM(own_run[0].folder, param_dtype="int8", matmul_dtype="int8")
    params = grok.SamplingParams(max_tokens=5, temperature=0, logprobs=0)
    (alone,) = llm.generate("The number 3", params)
    beside = llm.generate(["comes after", "The number 3"], params)[1]
    assert (beside.token_ids, beside.logprobs) == (alone.token_ids, alone.logprobs)


def test_streams_add_up_whatever_is_asked_meanwhile(llm):
    params = grok.SamplingParams(max_tokens=6, seed=1, logprobs=2, prompt_logprobs=0, experts=True)
    (whole,) = llm.generate("The number 7", params)
    stream = llm.stream("The number 7", params)
    begun = next(stream)
    assert len(llm.generate(["a", "b"], grok.SamplingParams(max_tokens=3))) == 2
    deltas = [begun, *stream]
    assert "".join(delta.text for delta in deltas) == whole.text
    assert sum((delta.token_ids for delta in deltas), ()) == whole.token_ids
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]
    assert [token.token for token in whole.logprobs] == list(whole.token_ids)
    assert whole.prompt_logprobs[0] is None
    layers = llm.model.config.num_layers
    assert all(len(token) == layers and len(token[0]) == 2 for token in whole.experts)
    next(llm.stream("a", params))  # left early
    assert llm.generate("The number 7", params) == [whole]


def test_scores_are_those_of_the_logits(llm):
    text = "The number 3 comes after 2"
    score, other = llm.score([text, "2"])
    assert score == llm.score([score.token_ids])[0]
    logits_TV = llm.model(np.array([score.token_ids]))[0]
    log_p_TV = np.asarray(jax.nn.log_softmax(logits_TV))
    expected = log_p_TV[np.arange(len(score.token_ids) - 1), list(score.token_ids[1:])]
    np.testing.assert_allclose(score.logprobs[1:], expected, rtol=1e-5)
    assert score.logprobs[0] is None
    assert score.total == pytest.approx(expected.sum(), rel=1e-5)
    assert other.total == 0
    assert llm.tokenizer.decode(score.token_ids) == text
    assert llm.score([]) == llm.generate([]) == []


def test_conversations_are_asked_by_the_template(llm):
    params = grok.SamplingParams(max_tokens=4, temperature=0)
    (output,) = llm.chat(TALK, params)
    text = "Human: What comes after 3?<|separator|>\n\nAssistant:"
    assert "<|separator|>" in built_in("grok-1").text
    assert llm.generate(text, params)[0].token_ids == output.token_ids
    both = llm.chat([TALK, TALK[:1]], params)
    assert [o.token_ids for o in both] == [output.token_ids] * 2
    assert "".join(delta.text for delta in llm.stream_chat(TALK, params)) == output.text
    assert llm.chat(TALK)[0].finish_reason == "length"  # as many tokens as the context leaves


def test_an_interrupted_engine_is_made_anew(llm, monkeypatch):
    params = grok.SamplingParams(max_tokens=4, temperature=0)
    (expected,) = llm.generate("after 2", params)
    other = llm.stream("a", params)
    next(other)
    for error in (KeyboardInterrupt, RuntimeError("out of memory")):
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "step", lambda _, error=error: (_ for _ in ()).throw(error))
            with pytest.raises((KeyboardInterrupt, EngineError)):
                llm.generate("after 2", params)
        assert llm.generate("after 2", params) == [expected]
    with pytest.raises(EngineError, match="was interrupted meanwhile; the same call would work"):
        list(other)


def test_refusals_are_sentences(own_run, llm, tmp_path):
    folder = own_run[0].folder
    with pytest.raises(ConfigError, match="no key tokeniser; did you mean tokenizer"):
        grok.LLM(folder, tokeniser="x")
    with pytest.raises(ConfigError, match=r"mesh .* needs 9 devices, and there are 8"):
        grok.LLM(folder, mesh={"data": 9})
    with pytest.raises(ConfigError, match=r"to serve; param_dtype=int8 beside it would work"):
        grok.LLM(folder, matmul_dtype="int8")
    with pytest.raises(CheckpointError, match="No such file"):
        grok.LLM(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"chat_template='grok-1'.* would work"):
        grok.LLM(folder).chat(TALK)
    with pytest.raises(RequestError, match="prompt should be a text"):
        llm.generate(3)
    with pytest.raises(RequestError, match="at most 127 new tokens fit"):
        llm.generate("a", grok.SamplingParams(max_tokens=500))
    with pytest.raises(RequestError, match=r"params is a list; one grok\.SamplingParams for all"):
        llm.generate("a", [grok.SamplingParams(max_tokens=2)])
    with pytest.raises(RequestError, match="the prompt is empty"):
        llm.score("")
    with pytest.raises(RequestError, match="messages should be a list of objects"):
        llm.chat("hello")
    with pytest.raises(ConfigError, match="folder names none to save in"):
        grok.save_checkpoint(dataclasses.replace(own_run[0], folder=""), None)
    simulated = dataclasses.replace(own_run[0].mesh, data=1, expert=1, tensor=4)
    with pytest.raises(ConfigError, match="folder names none to save in"):
        grok.save_checkpoint(dataclasses.replace(own_run[0], folder=""), None)
    simulated = dataclasses.replace(simulated, simulated_devices=4)
    with pytest.raises(ConfigError, match="simulated_devices=4 comes too late: JAX runs on 8"):
        grok.mesh_for(dataclasses.replace(own_run[0], mesh=simulated))


def test_the_reference_is_current_and_complete():
    assert (ROOT / "docs" / "api.md").read_text() == api_reference.page(), (
        "run `python docs/api_reference.py > docs/api.md`"
    )
    listed = {name for names in api_reference.SECTIONS.values() for name in names}
    assert listed == set(dir(grok)) - {"__version__"}


def test_editors_see_the_same_names():
    tree = ast.parse((ROOT / "grok" / "__init__.pyi").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    typed = {i.names[0].asname: (i.module, i.names[0].name) for i in imports}
    assert typed.keys() == set(dir(grok)) - {"__version__"}
    for name, (module, original) in typed.items():
        assert getattr(importlib.import_module(module), original) is getattr(grok, name)


def test_importing_is_light_and_every_name_is_there():
    code = "import grok, sys; assert not {'jax', 'numpy'} & sys.modules.keys(); print(dir(grok))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "'LLM'" in done.stdout
    assert all(getattr(grok, name) is not None for name in dir(grok))
    with pytest.raises(AttributeError, match="has no attribute 'Llm'"):
        _ = grok.Llm
