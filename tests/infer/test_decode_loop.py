"""The devices are a step ahead of the host: order of dispatches and fetches, arrays sent, and steps
that fail."""

import dataclasses

import jax
import numpy as np
import pytest

import grok
from grok.config import EngineConfig
from grok.config.sampling import SamplingParams
from grok.infer import engine as engine_module
from grok.infer.engine import Engine
from grok.infer.request import Request

FIVE = SamplingParams(max_tokens=5, temperature=0)


class Recorder:
    """The engine's program, with a record of its dispatches and of the fetches of its tokens."""

    def __init__(self):
        self._program = engine_module.forward_and_sample
        self.events: list[tuple[str, int]] = []
        self.sent: list[int] = []  # arrays of the host, by step
        self.failing_step: int | None = None

    def __call__(self, *arguments):
        self.sent.append(sum(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(arguments)))
        step = len(self.sent)
        self.events.append(("dispatch", step))
        result, *state = self._program(*arguments)
        sampled = Tokens(self, step, result.sampled_BU2)
        return dataclasses.replace(result, sampled_BU2=sampled), *state


class Tokens:
    """Tokens of a step on the devices."""

    def __init__(self, recorder: Recorder, step: int, array: jax.Array):
        self._recorder, self._step, self._array = recorder, step, array

    def copy_to_host_async(self) -> None:
        self._array.copy_to_host_async()

    def __array__(self, *args, **kwargs) -> np.ndarray:
        self._recorder.events.append(("fetch", self._step))
        if self._step == self._recorder.failing_step:
            raise RuntimeError("the device has failed")
        return np.asarray(self._array)


@pytest.fixture(scope="module")
def model(tiny_run):
    return grok.init(tiny_run.model, jax.random.key(3), one_device())


def one_device():
    return grok.make_mesh(devices=jax.devices()[:1])


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(engine_module, "forward_and_sample", recorder)
    return recorder


@pytest.fixture
def engine(model, recorder) -> Engine:
    options = EngineConfig(max_num_seqs=4, page_size=16, prefill_chunk_size=32, num_pages=32)
    return Engine(model, None, one_device(), options)


def test_a_step_is_dispatched_before_the_one_before_is_looked_at(engine, recorder):
    outputs = list(engine.generate([Request("a", (5, 6, 7), FIVE)]))
    assert sum(len(output.token_ids) for output in outputs) == 5
    # A prefill and four decodes: an answer of known length costs no step too many.
    expected = [("dispatch", 1)]
    for step in range(1, 5):
        expected += [("dispatch", step + 1), ("fetch", step)]
    assert recorder.events == [*expected, ("fetch", 5)]
    assert recorder.sent == [1] * 5


def test_what_is_asked_of_a_warm_engine_compiles_nothing(engine, caplog):
    everything = SamplingParams(
        max_tokens=4, min_tokens=2, stop_token_ids=(1,), banned_token_ids=(2,), logprobs=3,
        logit_bias={3: 1.5},
        prompt_logprobs=3, repetition_penalty=1.5, top_k=5, top_p=0.5, n=2
    )  # fmt: skip
    engine.warm_up()
    with jax.log_compiles():
        list(engine.generate([Request("all", tuple(range(3, 50)), everything)]))
    assert "Compiling" not in caplog.text


def test_what_was_computed_behind_an_end_is_dropped(engine, recorder):
    """Each answer ends at a token that is not known when the next step is dispatched, and the next
    request takes its slot and its pages at once."""
    alone = [list(engine.generate([Request("a", (5, 6, i), FIVE)])) for i in range(7)]
    tokens = [sum((output.token_ids for output in outputs), ()) for outputs in alone]
    ends = [answer.index(answer[2]) for answer in tokens]  # a token may come twice
    requests = [
        Request(f"{i}", (5, 6, i), dataclasses.replace(FIVE, stop_token_ids=(tokens[i][2],)))
        for i in range(7)
    ]
    before = engine.stats.tokens_out
    answers = {request.id: () for request in requests}
    for output in engine.generate(requests):
        answers[output.request_id] += output.token_ids
        assert output.finish_reason in (None, "stop")
    assert answers == {f"{i}": tokens[i][: ends[i]] for i in range(7)}
    assert engine.stats.tokens_out - before == sum(end + 1 for end in ends)
    assert (engine.unfinished, engine.stats.pages_used, engine.stats.running) == (0, 0, 0)


def test_a_step_that_fails_on_the_device_is_raised_where_its_tokens_are_looked_at(engine, recorder):
    recorder.failing_step = 3
    engine.submit(Request("a", (5, 6, 7), FIVE))
    outputs = [output for _ in range(3) for output in engine.step()]
    assert sum(len(output.token_ids) for output in outputs) == 2
    with pytest.raises(RuntimeError, match="the device has failed"):
        engine.step()
    assert recorder.events[-2:] == [("dispatch", 4), ("fetch", 3)]
    assert engine.unfinished == 1
    engine.cancel("a")
    assert engine.stats.pages_used == 0


def test_a_step_that_cannot_be_dispatched_is_raised_at_once(engine, recorder, monkeypatch):
    engine.submit(Request("a", (5, 6, 7), FIVE))
    engine.step()

    def refuse(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine_module, "forward_and_sample", refuse)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.step()


def test_a_cancelled_request_leaves_what_runs_beside_it_alone(engine, recorder):
    requests = [Request(f"{i}", (5, 6, i), FIVE) for i in range(4)]
    alone = [sum((o.token_ids for o in engine.generate([r])), ()) for r in requests]
    for request in requests:
        engine.submit(request)
    answers = {request.id: () for request in requests}
    for step in range(20):
        if step == 3:  # of "1", a token is on the devices that nobody has seen
            engine.cancel("1")
        for output in engine.step():
            answers[output.request_id] += output.token_ids
    assert engine.unfinished == 0
    assert [answers[f"{i}"] for i in (0, 2, 3)] == [alone[i] for i in (0, 2, 3)]
    assert answers["1"] == alone[1][: len(answers["1"])]
    assert 0 < len(answers["1"]) < 5
